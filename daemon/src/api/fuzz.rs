//! What the fuzz target of the API does with its bytes: calls to the real router over a real daemon without its process
//! (catalog, keystore, a store in a temporary directory, volumes, an attachment). Whatever is called, the answer is JSON of
//! the right shape and never "internal error", a stranger is refused, and nothing of one customer's gets to another's VM.
//!
//! Calls change the daemon, so a call may do something else than it would in a new one; it is made anew every now and then, and
//! a run that fails prints all calls since.

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, to_bytes};
use axum::extract::ConnectInfo;
use axum::http::{Method, Request, StatusCode, Uri};
use libvol::control::{Attachment, ErrorBody, List, StoreAdd, Vm};
use serde_json::Value;
use tower_service::Service;

use super::peer::Peer;
use super::routes;
use crate::operations::Operations;
use crate::process::own_uid;

/// Calls of one input; what follows is left out.
const CALLS_MAX: usize = 8;
/// Calls that a daemon is used for.
const CALLS_OF_A_DAEMON: usize = 2000;
/// Longer than anything takes.
const HANG: Duration = Duration::from_secs(60);
/// Somebody who is neither root nor the user the daemon runs as.
const STRANGER: u32 = 54_321;
/// A store is made for these paths only, in the daemon's own directory.
const STORES: &str = "/fuzz/";
const STORE_BYTES_MAX: u64 = 96 << 20;

/// What every daemon has at the beginning.
const FIRST: &[&str] = &[
    "POST /v1/stores\n{\"name\":\"one\",\"path\":\"/fuzz/one\",\"size_bytes\":67108864,\"allow_buffered\":true}",
    "POST /v1/customers\n{\"name\":\"acme\"}",
    "POST /v1/customers\n{\"name\":\"globex\"}",
    "POST /v1/vms\n{\"name\":\"vm1\",\"customer\":\"acme\"}",
    "POST /v1/vms\n{\"name\":\"vm2\",\"customer\":\"globex\"}",
    "POST /v1/volumes\n{\"volume\":\"acme/web\",\"size_bytes\":8388608}",
    "POST /v1/volumes\n{\"volume\":\"globex/db\",\"size_bytes\":8388608}",
    "POST /v1/attachments\n{\"volume\":\"acme/web\",\"vm\":\"vm1\"}",
];

/// Calls, with an empty line between them.
///
/// ```text
/// METHOD PATH
/// BODY
/// ```
///
/// A `?` in front of the method makes it a stranger's call.
pub(crate) fn api(input: &[u8]) {
    static DAEMON: Mutex<Option<Daemon>> = Mutex::new(None);
    let calls = parse(input);
    if calls.is_empty() {
        return;
    }
    let mut daemon = DAEMON.lock().unwrap_or_else(PoisonError::into_inner);
    if daemon
        .as_ref()
        .is_some_and(|daemon| daemon.log.len() >= CALLS_OF_A_DAEMON)
        && let Some(old) = daemon.take()
    {
        old.stop();
    }
    // Taken out: one that failed is not used again.
    let mut used = daemon.take().unwrap_or_else(Daemon::start);
    used.calls(calls);
    *daemon = Some(used);
}

struct Call {
    stranger: bool,
    method: Method,
    uri: Uri,
    body: Vec<u8>,
}

fn parse(input: &[u8]) -> Vec<Call> {
    let mut calls = Vec::new();
    let mut rest = input;
    while calls.len() < CALLS_MAX && !rest.is_empty() {
        let end = rest.windows(2).position(|two| two == b"\n\n");
        let (text, behind) = match end {
            Some(end) => (&rest[..end], &rest[end + 2..]),
            None => (rest, &[][..]),
        };
        calls.extend(Call::parse(text));
        rest = behind;
    }
    calls
}

impl Call {
    /// `None` for what HTTP cannot say.
    fn parse(text: &[u8]) -> Option<Self> {
        let (stranger, text) = match text.strip_prefix(b"?") {
            Some(text) => (true, text),
            None => (false, text),
        };
        let line_end = text.iter().position(|byte| *byte == b'\n').unwrap_or(text.len());
        let (line, body) = text.split_at(line_end);
        let space = line.iter().position(|byte| *byte == b' ')?;
        let (method, path) = (&line[..space], &line[space + 1..]);
        if !path.starts_with(b"/") {
            return None;
        }
        Some(Self {
            stranger,
            method: Method::from_bytes(method).ok()?,
            uri: Uri::try_from(path).ok()?,
            body: body.strip_prefix(b"\n").unwrap_or(&[]).to_vec(),
        })
    }

    /// No call makes a file, or finds a device, outside of the daemon's directory.
    fn keep_inside(&mut self, dir: &Path) {
        let Ok(mut add) = serde_json::from_slice::<StoreAdd>(&self.body) else {
            return;
        };
        let name = add.path.strip_prefix(STORES).unwrap_or("");
        let harmless = !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_lowercase());
        add.path = match harmless && add.size_bytes.is_none_or(|size| size <= STORE_BYTES_MAX) {
            true => dir.join(name).display().to_string(),
            false => dir.join("nowhere/store").display().to_string(),
        };
        self.body = serde_json::to_vec(&add).expect("made of JSON");
    }

    fn text(&self) -> String {
        let stranger = if self.stranger { "?" } else { "" };
        let body = String::from_utf8_lossy(&self.body);
        format!("{stranger}{} {}\n{body}", self.method, self.uri)
    }
}

struct Daemon {
    runtime: tokio::runtime::Runtime,
    dir: tempfile::TempDir,
    operations: Arc<Operations>,
    router: Router,
    /// All calls so far; printed when the daemon is dropped by a panic.
    log: Vec<String>,
}

impl Daemon {
    fn start() -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .expect("a runtime");
        // In memory where there is such a place: nothing here is to survive.
        let memory = Path::new("/dev/shm");
        let place = if memory.is_dir() {
            memory.to_owned()
        } else {
            std::env::temp_dir()
        };
        let dir = tempfile::Builder::new()
            .prefix("vold-fuzz-")
            .tempdir_in(place)
            .expect("a directory");
        let stores = dir.path().join("stores");
        std::fs::create_dir(&stores).expect("a directory");
        let operations = runtime
            .block_on(Operations::start_in(&dir.path().join("data"), 1))
            .expect("a new daemon");
        let mut daemon = Self {
            router: routes::router(operations.clone()),
            runtime,
            dir,
            operations,
            log: Vec::new(),
        };
        for call in FIRST {
            let call = Call::parse(call.as_bytes()).expect("a call");
            let (status, answer) = daemon.call(call);
            assert_eq!(status, StatusCode::OK, "{}", String::from_utf8_lossy(&answer));
        }
        daemon
    }

    fn stop(self) {
        self.runtime.block_on(self.operations.stop());
    }

    fn calls(&mut self, calls: Vec<Call>) {
        let mut changed = false;
        for call in calls {
            let what = call.text();
            let (stranger, head) = (call.stranger, call.method == Method::HEAD);
            let changes = call.method != Method::GET && !head;
            let (status, answer) = self.call(call);
            let said = String::from_utf8_lossy(&answer);
            assert!(
                !stranger || status == StatusCode::FORBIDDEN,
                "a stranger is answered with {status}: {what}"
            );
            assert!(
                status == StatusCode::OK
                    || status.is_client_error()
                    || [
                        StatusCode::NOT_IMPLEMENTED,
                        StatusCode::SERVICE_UNAVAILABLE,
                        StatusCode::INSUFFICIENT_STORAGE
                    ]
                    .contains(&status),
                "{status} for {what}: {said}"
            );
            changed |= changes && status == StatusCode::OK;
            if !head {
                check_shape(status, &answer, &what);
            }
        }
        if changed {
            self.check_customers();
        }
    }

    fn call(&mut self, mut call: Call) -> (StatusCode, Vec<u8>) {
        call.keep_inside(&self.dir.path().join("stores"));
        self.log.push(call.text());
        let uid = if call.stranger { STRANGER } else { own_uid() };
        let mut request = Request::builder()
            .method(call.method)
            .uri(call.uri)
            .body(Body::from(call.body))
            .expect("parts of a request");
        request
            .extensions_mut()
            .insert(ConnectInfo(Peer::said_to_be(Some(uid))));
        let mut router = self.router.clone();
        self.runtime.block_on(async move {
            let answer = tokio::time::timeout(HANG, router.call(request)).await;
            let Ok(answer) = answer.expect("an answer: a hang");
            let status = answer.status();
            let body = to_bytes(answer.into_body(), 64 << 20).await.expect("a body");
            (status, body.to_vec())
        })
    }

    /// Every attachment is of a volume and a VM of one customer.
    fn check_customers(&mut self) {
        let vms: List<Vm> = self.list("/v1/vms");
        let attachments: List<Attachment> = self.list("/v1/attachments");
        for attachment in attachments.items {
            let vm = vms.items.iter().find(|vm| vm.name == attachment.vm);
            let vm = vm.unwrap_or_else(|| panic!("attached to no VM: {attachment:?}"));
            assert_eq!(vm.customer, attachment.volume.customer, "{attachment:?}");
        }
    }

    fn list<T: serde::de::DeserializeOwned>(&mut self, path: &str) -> List<T> {
        let call = Call::parse(format!("GET {path}").as_bytes()).expect("a call");
        let (status, answer) = self.call(call);
        assert_eq!(status, StatusCode::OK, "{path}");
        self.log.pop();
        serde_json::from_slice(&answer).expect("a list")
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("calls since the daemon was new:\n\n{}", self.log.join("\n\n"));
        }
    }
}

fn check_shape(status: StatusCode, answer: &[u8], what: &str) {
    let said = String::from_utf8_lossy(answer);
    if status == StatusCode::OK {
        let parsed = serde_json::from_slice::<Value>(answer);
        assert!(
            parsed.is_ok_and(|value| value.is_object()),
            "no object for {what}: {said}"
        );
        return;
    }
    let body: ErrorBody = serde_json::from_slice(answer)
        .unwrap_or_else(|e| panic!("{status} for {what} without its body ({e}): {said}"));
    let line = body.error.message;
    assert!(
        !line.is_empty() && !line.contains('\n'),
        "not one line for {what}: {line:?}"
    );
}
