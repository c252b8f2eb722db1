//! A server on loopback that speaks the hub's routes and those of S3 that are used, and fails as it is told.

use serde_json::{Value, json};
use sha1::Sha1;
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, VecDeque};
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

/// The commit that `main` is.
pub const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// What it does to the next request for a file's bytes.
#[derive(Clone, Debug)]
pub enum Trouble {
    /// Closes the connection after so many bytes.
    Cut(usize),
    /// Answers with this status, and `Retry-After` where it says so.
    Status(u16, Option<&'static str>),
    /// Sends other bytes.
    Changed,
    /// Knows no ranges.
    Whole,
}

#[derive(Default)]
pub struct State {
    pub files: BTreeMap<String, Vec<u8>>,
    /// Files that are told of as Git LFS', which has SHA-256.
    pub large: Vec<String>,
    pub trouble: VecDeque<Trouble>,
    /// What the routes of the hub ask for.
    pub token: Option<String>,
    /// Size that a listing tells of, in place of the true one.
    pub wrong_size: Option<u64>,
    /// The object's tag, which is asked for with `If-Match`.
    pub tag: String,
    /// Requests for bytes: path, range, and whether a token came.
    pub asked: Vec<(String, Option<String>, bool)>,
    /// All requests.
    pub requests: usize,
}

pub struct Server {
    pub url: String,
    pub state: Arc<Mutex<State>>,
}

struct Request {
    method: String,
    path: String,
    headers: BTreeMap<String, String>,
}

impl Server {
    pub fn new(files: &[(&str, &[u8])]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let files = files.iter().map(|(name, bytes)| ((*name).to_owned(), bytes.to_vec())).collect();
        let state = Arc::new(Mutex::new(State { files, tag: "\"tag-1\"".into(), ..State::default() }));
        let shared = state.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let state = shared.clone();
                std::thread::spawn(move || answer(&stream, &state));
            }
        });
        Self { url, state }
    }

    pub fn with<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        change(&mut self.state.lock().unwrap())
    }
}

fn read(stream: &TcpStream) -> Option<Request> {
    let mut lines = BufReader::new(stream).lines().map_while(Result::ok);
    let first = lines.next()?;
    let mut words = first.split(' ');
    let (method, path) = (words.next()?.to_owned(), words.next()?.to_owned());
    let headers = lines.take_while(|line| !line.is_empty());
    let headers = headers.filter_map(|line| line.split_once(':').map(|(k, v)| (k.to_lowercase(), v.trim().to_owned())));
    Some(Request { method, path, headers: headers.collect() })
}

fn answer(stream: &TcpStream, state: &Mutex<State>) {
    let Some(request) = read(stream) else { return };
    let mut state = state.lock().unwrap();
    state.requests += 1;
    let signed = request.headers.get("authorization").cloned();
    if request.path.starts_with("/api/") {
        if state.token.as_ref().is_some_and(|token| signed != Some(format!("Bearer {token}"))) {
            return send(stream, 401, &[], b"{\"error\":\"no\"}", None);
        }
        return hub(stream, &state, &request);
    }
    if request.path.starts_with("/bucket?") {
        return list(stream, &state, &request);
    }
    let name = request.path.rsplit_once("/resolve/").map(|(_, rest)| rest.split_once('/').unwrap().1.to_owned());
    let name = name.unwrap_or_else(|| request.path.trim_start_matches("/bucket/").trim_start_matches('/').to_owned());
    let range = request.headers.get("range").cloned();
    let Some(mut bytes) = state.files.get(&name).cloned() else { return send(stream, 404, &[], b"", None) };
    let tag = state.tag.clone();
    let headers = [("ETag", tag.clone()), ("Last-Modified", "Tue, 01 Dec 2026 00:00:00 GMT".into())];
    if request.method == "HEAD" {
        return head(stream, bytes.len(), &headers);
    }
    state.asked.push((name, range.clone(), signed.is_some()));
    if state.token.as_ref().is_some_and(|token| signed != Some(format!("Bearer {token}"))) {
        return send(stream, 401, &[], b"", None);
    }
    if request.headers.get("if-match").is_some_and(|wanted| *wanted != tag) {
        return send(stream, 412, &[], b"", None);
    }
    let trouble = state.trouble.pop_front();
    drop(state);
    if let Some(Trouble::Status(status, after)) = trouble {
        let after: Vec<_> = after.iter().map(|after| ("Retry-After", (*after).to_owned())).collect();
        return send(stream, status, &after, b"", None);
    }
    if matches!(trouble, Some(Trouble::Changed)) {
        bytes.iter_mut().for_each(|byte| *byte ^= 1);
    }
    let cut = if let Some(Trouble::Cut(after)) = trouble { Some(after) } else { None };
    let bounds = range.filter(|_| !matches!(trouble, Some(Trouble::Whole)));
    let bounds = bounds
        .and_then(|range| range.strip_prefix("bytes=")?.split_once('-').map(|(a, b)| (a.to_owned(), b.to_owned())));
    let Some((from, to)) = bounds else { return send(stream, 200, &headers, &bytes, cut) };
    let (from, to) = (from.parse::<usize>().unwrap(), to.parse().unwrap_or(bytes.len() - 1));
    let all = bytes.len();
    let headers = [&headers[..], &[("Content-Range", format!("bytes {from}-{to}/{all}"))]].concat();
    send(stream, 206, &headers, &bytes[from..=to], cut);
}

fn hub(stream: &TcpStream, state: &State, request: &Request) {
    let (_, rest) = request.path.split_once("/org/name/").unwrap();
    if let Some(revision) = rest.strip_prefix("revision/") {
        return match ["main", "v1", COMMIT].contains(&revision) {
            true => send(stream, 200, &[], json!({"sha": COMMIT}).to_string().as_bytes(), None),
            false => send(stream, 404, &[], b"{}", None),
        };
    }
    let folder =
        rest.strip_prefix(&format!("tree/{COMMIT}")).unwrap().trim_start_matches('/').split('?').next().unwrap();
    let hex = |hash: &[u8]| hash.iter().map(|b| format!("{b:02x}")).collect::<String>();
    let entry = |name: &String, bytes: &Vec<u8>| {
        let size = state.wrong_size.unwrap_or(bytes.len() as u64);
        let git = hex(&Sha1::new_with_prefix(format!("blob {}\0", bytes.len())).chain_update(bytes).finalize());
        let lfs = state.large.contains(name).then(|| json!({"oid": hex(&Sha256::digest(bytes)), "size": size}));
        json!({"type": "file", "oid": git, "size": size, "path": name, "lfs": lfs})
    };
    let within = |name: &&String| name.rsplit_once('/').map_or("", |(of, _)| of) == folder;
    let all: Vec<Value> =
        state.files.iter().filter(|(name, _)| within(name)).map(|(name, bytes)| entry(name, bytes)).collect();
    // In two pages.
    let half = all.len().div_ceil(2);
    let (page, link) = match request.path.contains("cursor") {
        true => (&all[half..], None),
        false => {
            let next = format!("http://{}{}?cursor=2", request.headers["host"], request.path);
            (&all[..half], (all.len() > half).then(|| ("Link", format!("<{next}>; rel=\"next\""))))
        }
    };
    send(stream, 200, link.as_slice(), json!(page).to_string().as_bytes(), None);
}

fn list(stream: &TcpStream, state: &State, request: &Request) {
    assert!(request.path.contains("list-type=2"), "{}", request.path);
    let contents: String = state
        .files
        .iter()
        .map(|(name, bytes)| {
            let tag = state.tag.replace('"', "&quot;");
            format!("<Contents><Key>{name}</Key><LastModified>2026-12-01T00:00:00.000Z</LastModified><ETag>{tag}</ETag><Size>{}</Size></Contents>", bytes.len())
        })
        .collect();
    let xml =
        format!("<ListBucketResult><Name>bucket</Name><IsTruncated>false</IsTruncated>{contents}</ListBucketResult>");
    send(stream, 200, &[], xml.as_bytes(), None);
}

fn head(mut stream: &TcpStream, length: usize, headers: &[(&str, String)]) {
    let headers: String = headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
    let _ = write!(stream, "HTTP/1.1 200 x\r\nContent-Length: {length}\r\nConnection: close\r\n{headers}\r\n");
}

fn send(mut stream: &TcpStream, status: u16, headers: &[(&str, String)], body: &[u8], cut: Option<usize>) {
    let headers: String = headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
    let _ =
        write!(stream, "HTTP/1.1 {status} x\r\nContent-Length: {}\r\nConnection: close\r\n{headers}\r\n", body.len());
    let _ = stream.write_all(&body[..cut.unwrap_or(body.len()).min(body.len())]);
}
