//! The one HTTP client: TLS with Mozilla's roots or those of the Secret, proxies as the environment says, and no answer that is
//! waited for without end. It is `object_store`'s too.

use super::Patience;
use super::origin::{Fault, Opened};
use super::secret::Secret;
use crate::error::{Error, Result};
use bytes::Bytes;
use http_body::{Body, Frame};
use object_store::ClientOptions;
use object_store::client::{
    HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpResponse, HttpResponseBody, HttpService,
};
use serde::de::DeserializeOwned;
use std::io::Read;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;
use ureq::http::{Response, StatusCode, header};
use ureq::tls::{PemItem, RootCerts, TlsConfig, parse_pem};

/// The Secret's entry with the roots of a server of one's own.
const ROOTS: &str = "ca.crt";
/// Most bytes of an answer that is read as a whole.
const ANSWER_BYTES: u64 = 64 << 20;
/// Bytes that a body hands on at a time.
const CHUNK: usize = 256 << 10;

/// Clones are the same client.
#[derive(Clone)]
pub(super) struct Client(ureq::Agent);

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Client")
    }
}

/// As whom a server is asked, and how that is told where it refuses.
pub(super) struct Asked {
    bearer: Option<String>,
    secret: Option<String>,
    whom: &'static str,
}

impl Asked {
    pub fn new(secret: Option<&Secret>, bearer: Option<String>, whom: &'static str) -> Self {
        Self { bearer, secret: secret.map(|secret| secret.name.clone()), whom }
    }

    /// Why a server refused, and what to do about it.
    pub fn refused(&self, status: u16) -> String {
        let Self { secret, whom, .. } = self;
        match (status, secret) {
            (401, Some(name)) => format!(
                "{whom} answered 401: what the Secret '{name}' holds is not valid, or no longer; write a new one into it"
            ),
            (401, None) => format!(
                "{whom} answered 401: it is private or gated, or there is no such thing; name a Secret that opens it in secretRef"
            ),
            (403, Some(name)) => format!(
                "{whom} answered 403: whom the Secret '{name}' stands for may not read it; ask its owner for access, or name another Secret in secretRef"
            ),
            (403, None) => {
                format!("{whom} answered 403: not everybody may read it; name a Secret that opens it in secretRef")
            }
            (404, _) => format!("{whom} answered 404: there is no such thing; see to its name and revision"),
            _ => format!("{whom} answered {status}"),
        }
    }
}

impl Client {
    /// # Errors
    /// The Secret's roots are none.
    pub fn new(secret: Option<&Secret>, patience: Patience) -> Result<Self> {
        let roots = match secret.and_then(|secret| Some((secret, secret.get(ROOTS)?))) {
            Some((secret, pem)) => own_roots(&pem).ok_or_else(|| {
                Error::config(format!("the entry {ROOTS} of the Secret '{}' has no certificate in PEM", secret.name))
            })?,
            None => RootCerts::WebPki,
        };
        let config = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .redirect_auth_headers(ureq::config::RedirectAuthHeaders::SameHost)
            .user_agent(concat!("rlhf-trainer/", env!("CARGO_PKG_VERSION")))
            // As the file is: its size and hash are known.
            .accept_encoding("identity")
            .timeout_resolve(Some(patience.silence))
            .timeout_connect(Some(patience.silence))
            .timeout_recv_response(Some(patience.silence))
            .timeout_per_read(Some(patience.silence))
            .tls_config(TlsConfig::builder().root_certs(roots).build());
        Ok(Self(config.build().into()))
    }

    fn get(&self, url: &str, asked: &Asked, range: Option<String>) -> std::result::Result<Response<ureq::Body>, Fault> {
        let mut request = self.0.get(url);
        if let Some(token) = &asked.bearer {
            request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
        }
        if let Some(range) = range {
            request = request.header(header::RANGE, range);
        }
        let response = request.call().map_err(|e| unreached(asked.whom, &e))?;
        let status = response.status();
        match status {
            _ if status.is_success() => Ok(response),
            StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_MANY_REQUESTS => Err(busy(&response, asked.whom)),
            _ if status.is_server_error() => Err(busy(&response, asked.whom)),
            _ => Err(Fault::lasting(asked.refused(status.as_u16()))),
        }
    }

    /// An answer as JSON, and the address of the page after it.
    pub fn json<T: DeserializeOwned>(
        &self,
        url: &str,
        asked: &Asked,
    ) -> std::result::Result<(T, Option<String>), Fault> {
        let mut response = self.get(url, asked, None)?;
        let next = response.headers().get(header::LINK).and_then(|link| next_page(link.to_str().ok()?));
        let text = response.body_mut().with_config().limit(ANSWER_BYTES).read_to_vec();
        let text = text.map_err(|e| unreached(asked.whom, &e))?;
        let parsed = serde_json::from_slice(&text);
        let parsed =
            parsed.map_err(|e| Fault::lasting(format!("{} answered what is not its format: {e}", asked.whom)))?;
        Ok((parsed, next))
    }

    /// The bytes of a file.
    pub fn size(&self, url: &str, asked: &Asked) -> std::result::Result<u64, Fault> {
        let response = self.get(url, asked, Some("bytes=0-0".into()))?;
        let text = |name| response.headers().get(name).and_then(|value: &ureq::http::HeaderValue| value.to_str().ok());
        let size = match response.status() {
            StatusCode::PARTIAL_CONTENT => {
                text(header::CONTENT_RANGE).and_then(|range| range.rsplit_once('/')?.1.parse().ok())
            }
            _ => text(header::CONTENT_LENGTH).and_then(|length| length.parse().ok()),
        };
        size.ok_or_else(|| Fault::lasting(format!("{} does not say how large the file is", asked.whom)))
    }

    /// A file from a byte on.
    pub fn open(&self, url: &str, asked: &Asked, from: u64) -> std::result::Result<Opened, Fault> {
        let response = self.get(url, asked, (from > 0).then(|| format!("bytes={from}-")))?;
        let starts = response.headers().get(header::CONTENT_RANGE).and_then(|range| range.to_str().ok());
        let starts = starts.and_then(|range| range.trim().strip_prefix("bytes ")?.split_once('-')?.0.parse().ok());
        let from = match response.status() {
            StatusCode::PARTIAL_CONTENT => starts.unwrap_or(from),
            _ => 0,
        };
        Ok(Opened { from, bytes: Box::new(response.into_body().into_reader()) })
    }
}

fn own_roots(pem: &str) -> Option<RootCerts> {
    let items: Vec<_> = parse_pem(pem.as_bytes()).collect::<std::result::Result<_, _>>().ok()?;
    let certificates = items.into_iter().filter_map(|item| match item {
        PemItem::Certificate(certificate) => Some(certificate),
        _ => None,
    });
    let certificates: Vec<_> = certificates.collect();
    (!certificates.is_empty()).then(|| RootCerts::Specific(Arc::new(certificates)))
}

/// The address in `<address>; rel="next"`.
fn next_page(link: &str) -> Option<String> {
    let next = link.split(',').find(|part| part.contains("rel=\"next\""))?;
    Some(next.split_once('<')?.1.split_once('>')?.0.to_owned())
}

fn busy(response: &Response<ureq::Body>, whom: &str) -> Fault {
    let after = response.headers().get(header::RETRY_AFTER).and_then(|after| after.to_str().ok()?.trim().parse().ok());
    Fault::Passing { why: format!("{whom} answered {}", response.status()), after: after.map(Duration::from_secs) }
}

fn unreached(whom: &str, error: &ureq::Error) -> Fault {
    match error {
        ureq::Error::Tls(_)
        | ureq::Error::Rustls(_)
        | ureq::Error::TooManyRedirects
        | ureq::Error::BodyExceedsLimit(_) => Fault::lasting(format!("{whom} cannot be asked: {error}")),
        // A certificate that is refused comes so.
        ureq::Error::Io(io) if io.get_ref().is_some_and(|inner| inner.to_string().contains("certificate")) => {
            Fault::lasting(format!(
                "{whom} cannot be trusted: {io}; for a server of your own write its roots into the entry {ROOTS} of the Secret"
            ))
        }
        _ => Fault::passing(format!("{whom} cannot be reached: {error}")),
    }
}

impl HttpConnector for Client {
    fn connect(&self, _: &ClientOptions) -> object_store::Result<HttpClient> {
        Ok(HttpClient::new(self.clone()))
    }
}

/// It blocks: whoever drives a store drives nothing else.
#[async_trait::async_trait]
impl HttpService for Client {
    async fn call(&self, request: HttpRequest) -> std::result::Result<HttpResponse, HttpError> {
        let (parts, body) = request.into_parts();
        let response = match body.as_bytes().filter(|bytes| !bytes.is_empty()) {
            Some(bytes) => self.0.run(http::Request::from_parts(parts, bytes.to_vec())),
            None => self.0.run(http::Request::from_parts(parts, ())),
        };
        let (parts, body) = response.map_err(as_store)?.into_parts();
        let body = Blocking(Mutex::new(Box::new(body.into_reader())));
        Ok(HttpResponse::from_parts(parts, HttpResponseBody::new(body)))
    }
}

fn as_store(error: ureq::Error) -> HttpError {
    let kind = match &error {
        ureq::Error::Timeout(_) => HttpErrorKind::Timeout,
        ureq::Error::ConnectionFailed | ureq::Error::HostNotFound => HttpErrorKind::Connect,
        ureq::Error::Io(_) => HttpErrorKind::Interrupted,
        _ => HttpErrorKind::Unknown,
    };
    HttpError::new(kind, error)
}

/// A body that is read when it is asked for.
struct Blocking(Mutex<Box<dyn Read + Send>>);

impl Body for Blocking {
    type Data = Bytes;
    type Error = HttpError;

    fn poll_frame(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<std::result::Result<Frame<Bytes>, HttpError>>> {
        let mut chunk = vec![0; CHUNK];
        let read = self.0.lock().unwrap_or_else(PoisonError::into_inner).read(&mut chunk);
        Poll::Ready(match read {
            Ok(0) => None,
            Ok(n) => {
                chunk.truncate(n);
                Some(Ok(Frame::data(chunk.into())))
            }
            Err(error) => Some(Err(HttpError::new(HttpErrorKind::Interrupted, error))),
        })
    }
}
