//! What lies in a bucket of S3, Google Cloud Storage or Azure, or of whatever speaks as one of them.
//!
//! A file's tag is asked for with each of its ranges, so that all bytes are of one version: an object that changes meanwhile ends
//! it. (The tag itself is no hash that could be held against the bytes, since a bucket that encrypts makes another.)

use super::client::{Asked, Client};
use super::origin::{Check, Fault, File, Listing, Opened, Origin};
use super::secret::Secret;
use crate::error::{Error, Result};
use crate::hex::hex;
use futures::stream::BoxStream;
use futures::{StreamExt, TryStreamExt};
use object_store::aws::AmazonS3Builder;
use object_store::azure::MicrosoftAzureBuilder;
use object_store::gcp::GoogleCloudStorageBuilder;
use object_store::path::Path as Key;
use object_store::{GetOptions, GetRange, ObjectMeta, ObjectStore, ObjectStoreExt, RetryConfig};
use sha2::{Digest, Sha256};
use std::io::Read;
use std::sync::Arc;
use tokio::runtime::Runtime;

/// Entries of the Secret for S3, as AWS' own programs name them.
const S3: [&str; 5] =
    ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_REGION", "AWS_ENDPOINT_URL"];
/// Entries for Azure.
const AZURE: [&str; 3] = ["AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_ACCOUNT_KEY", "AZURE_STORAGE_SAS_TOKEN"];
/// Entries for Google.
const GOOGLE: [&str; 1] = ["GOOGLE_SERVICE_ACCOUNT_KEY"];
/// In the environment where the cluster itself says who a pod is.
const WORKLOAD_IDENTITY: [&str; 3] =
    ["AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONTAINER_CREDENTIALS_FULL_URI", "AZURE_FEDERATED_TOKEN_FILE"];

/// A folder of a bucket, or a file of it.
pub(super) struct Bucket {
    store: Arc<dyn ObjectStore>,
    runtime: Arc<Runtime>,
    asked: Asked,
    key: Key,
    /// The name on the volume where it is a file.
    file: Option<String>,
    /// What tells servers of one scheme apart.
    server: String,
}

/// What says where a bucket is, in a Secret or else in the environment; Google's key may name a server of its own.
const SERVER: [&str; 4] =
    ["AWS_ENDPOINT_URL", "AWS_REGION", "AZURE_STORAGE_ACCOUNT_NAME", "GOOGLE_SERVICE_ACCOUNT_KEY"];

impl Bucket {
    pub fn new(
        client: &Client,
        secret: Option<&Secret>,
        scheme: &str,
        bucket: &str,
        key: &str,
        file: Option<String>,
    ) -> Result<Self> {
        let store = match scheme {
            "s3" => s3(client, secret, bucket),
            "gs" => google(client, secret, bucket),
            _ => azure(client, secret, bucket),
        };
        let said = |name: &str| match secret {
            Some(secret) => secret.get(name),
            None => std::env::var(name).ok(),
        };
        let server = SERVER.map(|name| said(name).unwrap_or_default()).join(" ");
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build();
        Ok(Self {
            store: store.map_err(|e| Error::config(format!("its store cannot be opened: {e}")))?,
            runtime: Arc::new(runtime.map_err(|e| Error::bug(format!("no runtime: {e}")))?),
            asked: Asked::new(secret, None, "the bucket's server"),
            key: Key::parse(key).map_err(|e| Error::config(e.to_string()))?,
            file,
            server,
        })
    }

    fn file(&self, found: &ObjectMeta, name: String) -> std::result::Result<File, Fault> {
        let tag = found.e_tag.clone().or_else(|| found.version.clone());
        let tag = tag.ok_or_else(|| Fault::lasting("the bucket's server gives its files no tags"))?;
        Ok(File { name, key: found.location.to_string(), size: found.size, check: Check::Tag(tag) })
    }

    fn fault(&self, error: object_store::Error) -> Fault {
        use object_store::Error::{NotFound, PermissionDenied, Precondition, Unauthenticated};
        match error {
            NotFound { .. } => Fault::lasting(self.asked.refused(404)),
            Unauthenticated { .. } => Fault::lasting(self.asked.refused(401)),
            PermissionDenied { .. } => Fault::lasting(self.asked.refused(403)),
            Precondition { path, .. } => {
                Fault::lasting(format!("{path} was changed while it was fetched; leave it as it is, and start again"))
            }
            other => Fault::passing(format!("the bucket's server failed: {other}")),
        }
    }
}

/// Tries are counted by who asks.
fn no_retries() -> RetryConfig {
    RetryConfig { max_retries: 0, ..RetryConfig::default() }
}

/// Without a Secret, and where the cluster gives the pod no identity, a bucket is asked as everybody may.
fn is_anonymous(secret: Option<&Secret>) -> bool {
    secret.is_none() && WORKLOAD_IDENTITY.iter().all(|name| std::env::var_os(name).is_none())
}

/// What a builder is told: the entries that the Secret has, each with the builder's key of that name.
fn entries<K: std::str::FromStr>(secret: Option<&Secret>, names: &[&str]) -> Vec<(K, String)> {
    let told = |name: &&str| Some((name.to_lowercase().parse().ok()?, secret?.get(name)?));
    names.iter().filter_map(told).collect()
}

fn s3(client: &Client, secret: Option<&Secret>, bucket: &str) -> object_store::Result<Arc<dyn ObjectStore>> {
    let base = if secret.is_some() { AmazonS3Builder::new() } else { AmazonS3Builder::from_env() };
    let builder = entries(secret, &S3).into_iter().fold(base, |builder, (key, value)| builder.with_config(key, value));
    let builder = builder.with_bucket_name(bucket).with_allow_http(true).with_retry(no_retries());
    let store = builder.with_skip_signature(is_anonymous(secret)).with_http_connector(client.clone()).build()?;
    Ok(Arc::new(store))
}

fn google(client: &Client, secret: Option<&Secret>, bucket: &str) -> object_store::Result<Arc<dyn ObjectStore>> {
    let base = if secret.is_some() { GoogleCloudStorageBuilder::new() } else { GoogleCloudStorageBuilder::from_env() };
    let builder =
        entries(secret, &GOOGLE).into_iter().fold(base, |builder, (key, value)| builder.with_config(key, value));
    let builder = builder.with_bucket_name(bucket).with_retry(no_retries());
    let store = builder.with_skip_signature(is_anonymous(secret)).with_http_connector(client.clone()).build()?;
    Ok(Arc::new(store))
}

fn azure(client: &Client, secret: Option<&Secret>, container: &str) -> object_store::Result<Arc<dyn ObjectStore>> {
    let base = if secret.is_some() { MicrosoftAzureBuilder::new() } else { MicrosoftAzureBuilder::from_env() };
    let builder =
        entries(secret, &AZURE).into_iter().fold(base, |builder, (key, value)| builder.with_config(key, value));
    let builder = builder.with_container_name(container).with_allow_http(true).with_retry(no_retries());
    let store = builder.with_skip_signature(is_anonymous(secret)).with_http_connector(client.clone()).build()?;
    Ok(Arc::new(store))
}

/// Tells one state of the files from any other.
fn revision(files: &[File]) -> String {
    let mut hasher = Sha256::new();
    for File { name, size, check, .. } in files {
        hasher.update(format!("{name}\0{size}\0{check:?}\n"));
    }
    hex(&hasher.finalize())
}

impl Origin for Bucket {
    fn server(&self) -> &str {
        &self.server
    }

    fn list(&self, pinned: Option<&str>) -> std::result::Result<Listing, Fault> {
        let mut files = match &self.file {
            Some(name) => {
                let found = self.runtime.block_on(self.store.head(&self.key)).map_err(|e| self.fault(e))?;
                vec![self.file(&found, name.clone())?]
            }
            None => {
                let found = self.runtime.block_on(self.store.list(Some(&self.key)).try_collect::<Vec<_>>());
                let below = format!("{}/", self.key);
                let found = found.map_err(|e| self.fault(e))?;
                let name = |found: &ObjectMeta| {
                    let path: &str = found.location.as_ref();
                    path.strip_prefix(&below).map(str::to_owned)
                };
                let named = found.iter().filter_map(|found| Some(self.file(found, name(found)?)));
                named.collect::<std::result::Result<_, _>>()?
            }
        };
        files.sort_by(|a, b| a.name.cmp(&b.name));
        let revision = revision(&files);
        if pinned.is_some_and(|pinned| pinned != revision) {
            return Err(Fault::lasting(
                "it is not what it was when this run began, and what was fetched then is no longer in the cache; put it back, or begin another run",
            ));
        }
        Ok(Listing { revision, files })
    }

    fn open(&self, file: &File, from: u64) -> std::result::Result<Opened, Fault> {
        let Check::Tag(tag) = &file.check else { return Err(Fault::lasting("a bucket's file without a tag")) };
        let range = (from > 0).then_some(GetRange::Offset(from));
        let options = GetOptions { if_match: Some(tag.clone()), range, ..GetOptions::default() };
        let key = Key::parse(&file.key).map_err(|e| Fault::lasting(e.to_string()))?;
        let found = self.runtime.block_on(self.store.get_opts(&key, options)).map_err(|e| self.fault(e))?;
        let from = found.range.start;
        let bytes = Streamed { runtime: self.runtime.clone(), stream: found.into_stream(), rest: bytes::Bytes::new() };
        Ok(Opened { from, bytes: Box::new(bytes) })
    }
}

/// A stream of bytes, read one after the other.
struct Streamed {
    runtime: Arc<Runtime>,
    stream: BoxStream<'static, object_store::Result<bytes::Bytes>>,
    rest: bytes::Bytes,
}

impl Read for Streamed {
    fn read(&mut self, into: &mut [u8]) -> std::io::Result<usize> {
        while self.rest.is_empty() {
            match self.runtime.block_on(self.stream.next()) {
                Some(Ok(bytes)) => self.rest = bytes,
                Some(Err(error)) => return Err(std::io::Error::other(error)),
                None => return Ok(0),
            }
        }
        let bytes = self.rest.split_to(self.rest.len().min(into.len()));
        into[..bytes.len()].copy_from_slice(&bytes);
        Ok(bytes.len())
    }
}
