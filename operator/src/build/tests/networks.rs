//! Who reaches pods, by which names and with which key.

use super::*;

#[test]
fn the_key_to_the_progress_is_in_the_jobs_secret_and_nowhere_else() {
    let children = build(&job(), 1, 2);
    let secret = children.secret.clone().unwrap().0;
    let key = settings().keys.of("0123456789-abc");
    assert_eq!((secret.immutable, &secret.data.unwrap()["key"].0), (Some(true), &key.clone().into_bytes()));
    let reference = container(&children).env.unwrap().into_iter().find(|e| e.name == env::PROGRESS_KEY).unwrap();
    let reference = reference.value_from.unwrap().secret_key_ref.unwrap();
    assert_eq!((Some(reference.name), reference.key.as_str()), (secret.metadata.name.clone(), "key"));
    assert_eq!(reference.optional, None, "a pod without the key does not start");
    assert!(build(&job(), 0, 1).secret.is_none(), "prepare tells of no progress");
    let Children { network_policy, config_map, service, job: made, .. } = &children;
    let rest = serde_json::to_string(&(network_policy, config_map, service, made)).unwrap();
    assert!(!rest.contains(&key) && !format!("{children:?}{:?}", settings()).contains(&key));
    let mut other = job();
    other.metadata.uid = Some("another".into());
    assert_ne!(build(&other, 1, 1).secret.unwrap().0.metadata.name, secret.metadata.name);
}

fn policy(job: &RLHFJob, rules: NetworkRules) -> Value {
    let settings = Settings { network: Some(rules), ..settings() };
    let children = children(job, Task::all(job).nth(1).unwrap(), FIRST, &settings).unwrap();
    serde_json::to_value(children.network_policy.unwrap().spec.unwrap()).unwrap()
}

#[test]
fn case_46_the_network_lets_in_the_gang_everywhere_and_readers_at_the_workers_ports() {
    let own = json!({"matchLabels": {"app.kubernetes.io/managed-by": "rlhf-operator", "rlhf.dev/job": "demo", "rlhf.dev/job-uid": "0123456789-abc"}});
    let spec = policy(&job(), rules("All"));
    assert_eq!((&spec["podSelector"], &spec["policyTypes"]), (&own, &json!(["Ingress", "Egress"])));
    assert_eq!(spec["ingress"][0], json!({"from": [{"podSelector": own}]}));
    assert_eq!(spec["ingress"][1]["ports"], json!([{"protocol": "TCP", "port": 9400, "endPort": 9401}]));
    let readers = spec["ingress"][1]["from"].as_array().unwrap();
    let names = readers.iter().map(|r| &r["podSelector"]["matchLabels"]["app.kubernetes.io/name"]);
    assert_eq!(names.collect::<Vec<_>>(), ["rlhf-operator", "prometheus"]);
    assert_eq!(spec["ingress"].as_array().unwrap().len(), 2);
    assert_eq!(spec["egress"], json!([{}]), "to everybody, also where another policy denies all");
    for index in 0..4 {
        let labels = build(&job(), index, 3).job.spec.unwrap().template.metadata.unwrap().labels.unwrap();
        let wanted: BTreeMap<String, String> = serde_json::from_value(own["matchLabels"].clone()).unwrap();
        assert!(wanted.iter().all(|(k, v)| labels.get(k) == Some(v)), "{labels:?}");
    }
}

#[test]
fn a_restricted_network_lets_out_to_the_gang_and_to_dns_and_without_readers_nobody_reads() {
    let spec = policy(&job(), NetworkRules { operator: vec![], prometheus: vec![], ..rules("Restricted") });
    assert_eq!(spec["policyTypes"], json!(["Ingress", "Egress"]));
    assert_eq!(spec["egress"][0]["to"][0]["podSelector"], spec["podSelector"]);
    let dns = [53, 5353].map(|port| ["UDP", "TCP"].map(|protocol| json!({"protocol": protocol, "port": port})));
    assert_eq!(spec["egress"][1], json!({"ports": dns.concat()}));
    assert_eq!((spec["egress"].as_array().unwrap().len(), spec["ingress"].as_array().unwrap().len()), (2, 1));
    let without = Settings { network: None, ..settings() };
    assert!(children(&job(), Task::Prepare, FIRST, &without).unwrap().network_policy.is_none());
}

#[test]
fn the_service_names_this_jobs_first_pod_before_it_is_ready() {
    let service = build(&job(), 1, 1).service.unwrap();
    let spec = service.spec.unwrap();
    assert_eq!(service.metadata.name, Some(service_name()));
    assert_eq!(build(&job(), 2, 1).service.unwrap().metadata.name, Some(service_name()), "one for all stages");
    assert_eq!((spec.cluster_ip.as_deref(), spec.publish_not_ready_addresses), (Some("None"), Some(true)));
    assert_eq!(spec.ports.unwrap()[0].port, 29500);
    let mut selector = spec.selector.unwrap();
    assert_eq!(selector.remove(INDEX_KEY).as_deref(), Some("0"));
    for (stage, attempt) in [(1, 5), (3, 1)] {
        let pod = build(&job(), stage, attempt).job.spec.unwrap().template;
        let labels = pod.metadata.unwrap().labels.unwrap();
        assert!(selector.iter().all(|(k, v)| labels.get(k) == Some(v)), "{selector:?}");
        assert_eq!(pod.spec.unwrap().subdomain, Some(service_name()));
    }
    assert_eq!(selector[names::LABEL_JOB_UID], "0123456789-abc");
    let of_some = |label| selector.contains_key(label);
    assert!(!of_some(names::LABEL_ATTEMPT) && !of_some(names::LABEL_STAGE), "one serves every attempt at all stages");
}
