//! The keys that guard the progress of trainers: one for each job, all from one secret of the operator.
//!
//! A job's key is an HMAC of its UID. So every replica of the operator, and one that starts anew, knows the key
//! without reading it back, and the operator needs no right to read Secrets of the namespaces in which jobs run: it
//! creates them. Its own secret lies in a Secret that the chart makes without content; the first operator to start
//! fills it. No key is ever printed: `Debug` shows none.

use hmac::{Hmac, Mac};
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::Secret;
use kube::api::{Patch, PatchParams};
use kube::{Api, Client};
use serde_json::json;
use sha2::Sha256;
use std::fmt;
use std::sync::Arc;

/// The entry of the operator's Secret.
const ENTRY: &str = "key";
/// 256 bits.
const BYTES: usize = 32;
/// HMAC pads a key with zeros to this length.
const BLOCK: usize = 64;
/// Two replicas that start together may each find the Secret empty; the second then reads what the first wrote.
const TRIES: u32 = 5;

/// The secret from which the keys of jobs follow.
#[derive(Clone)]
pub struct ProgressKeys(Arc<[u8; BLOCK]>);

impl fmt::Debug for ProgressKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ProgressKeys(..)")
    }
}

/// The operator's secret could not be had.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The chart makes it.
    #[error(
        "Secret {namespace}/{name} is missing: the chart makes it, empty; the operator keeps in it the secret from which \
         the keys of jobs follow"
    )]
    Missing {
        /// Where it was looked for.
        namespace: String,
        /// Its name.
        name: String,
    },
    /// Somebody wrote something else into it.
    #[error("entry {ENTRY} of Secret {0} has not {BYTES} bytes; delete the entry, and the operator makes one")]
    Length(String),
    /// No random numbers.
    #[error("the system gives no random numbers: {0}")]
    Random(#[from] getrandom::Error),
    /// The API server's answer.
    #[error("Secret {name} cannot be {what}: {source}")]
    Api {
        /// Its name.
        name: String,
        /// What was tried.
        what: &'static str,
        /// The answer.
        source: kube::Error,
    },
    /// Somebody else keeps writing it.
    #[error("Secret {0} changes with every look")]
    Contended(String),
}

impl ProgressKeys {
    /// Keys that follow from a secret of 256 bits.
    pub fn new(secret: [u8; BYTES]) -> Self {
        let mut block = [0; BLOCK];
        block[..BYTES].copy_from_slice(&secret);
        Self(Arc::new(block))
    }

    /// The key of the job with this UID, in hexadecimal.
    pub fn of(&self, uid: &str) -> String {
        self.hmac("key", uid)
    }

    /// A part of the name of the job's Secret, which says nothing about the key.
    pub fn tag(&self, uid: &str) -> String {
        self.hmac("name", uid).chars().take(10).collect()
    }

    fn hmac(&self, purpose: &str, uid: &str) -> String {
        let mut mac = Hmac::<Sha256>::new(&(*self.0).into());
        mac.update(format!("rlhf.dev/progress/{purpose}/{uid}").as_bytes());
        mac.finalize().into_bytes().iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// Reads the operator's secret, and makes it where there is none yet.
    pub async fn load(client: &Client, namespace: &str, name: &str) -> Result<Self, Error> {
        let api: Api<Secret> = Api::namespaced(client.clone(), namespace);
        let failed = |what, source| Error::Api { name: name.into(), what, source };
        for _ in 0..TRIES {
            let found = api.get_opt(name).await.map_err(|e| failed("read", e))?;
            let found = found.ok_or_else(|| Error::Missing { namespace: namespace.into(), name: name.into() })?;
            if let Some(ByteString(secret)) = found.data.as_ref().and_then(|d| d.get(ENTRY)) {
                let secret = secret.as_slice().try_into().map_err(|_| Error::Length(name.into()))?;
                return Ok(Self::new(secret));
            }
            let mut fresh = [0; BYTES];
            getrandom::fill(&mut fresh)?;
            // The resource version keeps it from replacing what another replica wrote meanwhile.
            let change = json!({
                "metadata": {"resourceVersion": found.metadata.resource_version},
                "data": {ENTRY: ByteString(fresh.into())},
            });
            match api.patch(name, &PatchParams::default(), &Patch::Merge(change)).await {
                Ok(_) => {}
                Err(kube::Error::Api(status)) if status.is_conflict() => {}
                Err(source) => return Err(failed("written", source)),
            }
        }
        Err(Error::Contended(name.into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::{Method, Request, Response};
    use http_body_util::BodyExt;
    use kube::client::Body;
    use serde_json::Value;
    use std::sync::Mutex;

    /// An API server that keeps one Secret. Before the first write another replica writes, if there is one.
    fn server(secret: Option<Value>, rival: Option<Value>) -> (Client, Arc<Mutex<Option<Value>>>) {
        let stored = Arc::new(Mutex::new(secret));
        let (kept, rival) = (stored.clone(), Arc::new(Mutex::new(rival)));
        let service = tower::service_fn(move |request: Request<Body>| {
            let (stored, rival) = (kept.clone(), rival.clone());
            async move {
                let (parts, body) = request.into_parts();
                let change: Value =
                    serde_json::from_slice(&body.collect().await.unwrap().to_bytes()).unwrap_or_default();
                let mut stored = stored.lock().unwrap();
                let mut code = if stored.is_some() { 200 } else { 404 };
                if parts.method == Method::PATCH {
                    if let Some(other) = rival.lock().unwrap().take() {
                        *stored = Some(other);
                    }
                    let now = stored.as_mut().unwrap();
                    if now["metadata"]["resourceVersion"] == change["metadata"]["resourceVersion"] {
                        now["data"] = change["data"].clone();
                    } else {
                        code = 409;
                    }
                }
                let reason = if code == 409 { "Conflict" } else { "NotFound" };
                let refused = json!({"kind": "Status", "status": "Failure", "reason": reason, "code": code});
                let answer = if code == 200 { stored.clone().unwrap() } else { refused };
                Ok::<_, tower::BoxError>(
                    Response::builder().status(code).body(Body::from(answer.to_string().into_bytes())).unwrap(),
                )
            }
        });
        (Client::new(service, "sys"), stored)
    }

    fn empty(version: &str) -> Value {
        json!({"metadata": {"name": "own", "resourceVersion": version}})
    }

    fn with_key(version: &str, bytes: &[u8]) -> Value {
        json!({"metadata": {"name": "own", "resourceVersion": version}, "data": {ENTRY: ByteString(bytes.into())}})
    }

    #[test]
    fn each_job_has_a_key_of_its_own_that_nothing_shows() {
        let keys = ProgressKeys::new([7; BYTES]);
        assert_eq!(keys.of("a"), keys.clone().of("a"));
        assert_eq!((keys.of("a").len(), keys.tag("a").len()), (64, 10));
        assert_ne!(keys.of("a"), keys.of("b"));
        assert_ne!(keys.of("a"), ProgressKeys::new([8; BYTES]).of("a"));
        assert!(!keys.of("a").contains(&keys.tag("a")));
        assert_eq!(format!("{keys:?}"), "ProgressKeys(..)");
    }

    #[tokio::test]
    async fn the_first_operator_makes_the_secret_and_the_next_reads_it() {
        let (client, stored) = server(Some(empty("1")), None);
        let first = ProgressKeys::load(&client, "sys", "own").await.unwrap();
        let next = ProgressKeys::load(&client, "sys", "own").await.unwrap();
        assert_eq!(first.of("uid"), next.of("uid"));
        let (other, _) = server(Some(empty("1")), None);
        assert_ne!(ProgressKeys::load(&other, "sys", "own").await.unwrap().of("uid"), first.of("uid"), "it is random");
        assert!(stored.lock().unwrap().as_ref().unwrap()["data"][ENTRY].is_string());
    }

    #[tokio::test]
    async fn of_two_that_start_together_both_use_the_secret_that_was_written_first() {
        let (client, _) = server(Some(empty("1")), Some(with_key("2", &[9; BYTES])));
        let keys = ProgressKeys::load(&client, "sys", "own").await.unwrap();
        assert_eq!(keys.of("uid"), ProgressKeys::new([9; BYTES]).of("uid"));
    }

    #[tokio::test]
    async fn what_is_wrong_with_the_secret_is_said() {
        for (secret, said) in [
            (None, "Secret sys/own is missing: the chart makes it"),
            (Some(with_key("1", b"short")), "has not 32 bytes"),
        ] {
            let error = ProgressKeys::load(&server(secret, None).0, "sys", "own").await.unwrap_err().to_string();
            assert!(error.contains(said), "{error}");
        }
    }
}
