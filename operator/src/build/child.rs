//! A child as it is written to the API server, and what becomes of one that is there already. [`Children::needed`] is
//! the list of all that an attempt needs beside its Job.

use super::{Children, KeySecret};
use k8s_openapi::NamespaceResourceScope;
use kube::Resource;
use kube::api::ApiResource;
use serde::Serialize;
use serde_json::Value;
use std::fmt;
use std::hash::{DefaultHasher, Hash, Hasher};

/// What becomes of a child that is there already and is the job's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Upgrade {
    /// It stays as it is.
    Keep,
    /// It stays as it is, and is not even looked at: the operator may not read its kind, and nobody else knows its name
    /// before it is made.
    Unread,
    /// Its `spec` is applied: what was written before and is written no more goes.
    Apply,
}

/// One object of an attempt.
#[derive(Clone)]
pub struct Child {
    /// Its kind.
    pub resource: ApiResource,
    /// Its name.
    pub name: String,
    /// As it is to be.
    pub body: Value,
    /// What becomes of one that is there.
    pub upgrade: Upgrade,
    /// Whether all stages of the job have the same.
    pub shared: bool,
}

/// Without what is in it, which may be a key.
impl fmt::Debug for Child {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.title())
    }
}

impl Child {
    /// From an object.
    ///
    /// # Errors
    /// It cannot be written as JSON.
    pub fn new<K>(object: &K, upgrade: Upgrade, shared: bool) -> serde_json::Result<Self>
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope> + Serialize,
    {
        let mut body = serde_json::to_value(object)?;
        body["apiVersion"] = K::api_version(&()).into();
        body["kind"] = K::kind(&()).into();
        let name = object.meta().name.clone().unwrap_or_default();
        Ok(Self { resource: ApiResource::erase::<K>(&()), name, body, upgrade, shared })
    }

    /// For people: its kind and name.
    pub fn title(&self) -> String {
        format!("{} {}", self.resource.kind, self.name)
    }

    /// Differs between children that differ.
    pub fn tag(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        (&self.resource.kind, &self.name, self.body.to_string()).hash(&mut hasher);
        hasher.finish()
    }
}

impl Children {
    /// What the attempt's pods need, in no order: all of it is made before the Job.
    ///
    /// # Errors
    /// An object cannot be written as JSON.
    pub fn needed(&self) -> serde_json::Result<Vec<Child>> {
        let Self { network_policy, outside, secret, config_map, service, pod_group, .. } = self;
        let secret = secret.as_ref().map(|KeySecret(secret)| Child::new(secret, Upgrade::Unread, true));
        let all = [
            network_policy.as_ref().map(|policy| Child::new(policy, Upgrade::Apply, true)),
            outside.as_ref().map(|policy| Child::new(policy, Upgrade::Apply, true)),
            secret,
            Some(Child::new(config_map, Upgrade::Keep, true)),
            service.as_ref().map(|service| Child::new(service, Upgrade::Keep, true)),
            pod_group.as_ref().map(|group| Child::new(group, Upgrade::Keep, false)),
        ];
        all.into_iter().flatten().collect()
    }

    /// The attempt itself, which is made last.
    ///
    /// # Errors
    /// It cannot be written as JSON.
    pub fn attempt(&self) -> serde_json::Result<Child> {
        Child::new(&self.job, Upgrade::Keep, false)
    }
}
