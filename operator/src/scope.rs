//! Whose RLHFJobs an operator runs: those of which namespaces, and of which class.
//!
//! Releases of the operator stand side by side where each has namespaces or a class of its own. The class is a label, by
//! which the API server selects: of a job of another class an operator knows nothing, and one whose label changes goes
//! from one operator to the other, with its status and its children.

use k8s_openapi::NamespaceResourceScope;
use kube::{Api, Client, Resource};
use rlhf_api::names;

/// The namespaces and the class of an operator.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Scope {
    namespaces: Vec<String>,
    class: Option<String>,
}

impl Scope {
    /// Of these namespaces (of all, if none is named), the jobs of this class (if none is named, those without a class).
    /// Empty names count for nothing, and a name that is given twice counts once.
    pub fn new(namespaces: &[String], class: &str) -> Self {
        let mut namespaces: Vec<_> = namespaces.iter().filter(|n| !n.is_empty()).cloned().collect();
        namespaces.sort();
        namespaces.dedup();
        Self { namespaces, class: Some(class.to_owned()).filter(|c| !c.is_empty()) }
    }

    /// What is watched: each namespace by itself, or all as one (`None`).
    pub fn parts(&self) -> Vec<Option<&str>> {
        if self.namespaces.is_empty() {
            return vec![None];
        }
        self.namespaces.iter().map(|n| Some(n.as_str())).collect()
    }

    /// The part in which the objects of a namespace are.
    pub fn part_of<'a>(&self, namespace: &'a str) -> Option<&'a str> {
        (!self.namespaces.is_empty()).then_some(namespace)
    }

    /// The label selector of its RLHFJobs.
    pub fn selector(&self) -> String {
        match &self.class {
            Some(class) => format!("{}={class}", names::LABEL_CLASS),
            None => format!("!{}", names::LABEL_CLASS),
        }
    }
}

impl std::fmt::Display for Scope {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.namespaces[..] {
            [] => f.write_str("all namespaces")?,
            some => write!(f, "{}", some.join(", "))?,
        }
        self.class.iter().try_for_each(|class| write!(f, ", class {class}"))
    }
}

/// The API of a kind in one part of a scope.
pub(crate) fn api_of<K>(client: &Client, part: Option<&str>) -> Api<K>
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope>,
{
    match part {
        Some(namespace) => Api::namespaced(client.clone(), namespace),
        None => Api::all(client.clone()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scope(namespaces: &[&str], class: &str) -> Scope {
        Scope::new(&namespaces.iter().map(|n| (*n).to_owned()).collect::<Vec<_>>(), class)
    }

    #[test]
    fn without_names_it_is_every_namespace_and_otherwise_each_by_itself() {
        for all in [scope(&[], ""), scope(&[""], "")] {
            assert_eq!((all.parts(), all.part_of("a")), (vec![None], None));
            assert_eq!(all.to_string(), "all namespaces");
        }
        let two = scope(&["b", "a", "b", ""], "");
        assert_eq!((two.parts(), two.part_of("a")), (vec![Some("a"), Some("b")], Some("a")));
        assert_eq!(two.to_string(), "a, b");
    }

    #[test]
    fn a_class_selects_its_own_jobs_and_none_those_without() {
        assert_eq!(scope(&[], "").selector(), "!rlhf.dev/class");
        assert_eq!(scope(&[], "canary").selector(), "rlhf.dev/class=canary");
        assert_eq!(scope(&["a"], "canary").to_string(), "a, class canary");
    }
}
