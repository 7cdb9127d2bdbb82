//! The API over its real socket, with the real catalog, keystore and shards; what needs stores is in the end-to-end suite.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use libvol::control::{self, ErrorBody, List};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use super::Server;
use crate::operations::Operations;

/// A daemon without its process.
struct Daemon {
    dir: tempfile::TempDir,
    socket: PathBuf,
    operations: Arc<Operations>,
    stop: oneshot::Sender<()>,
    serving: JoinHandle<()>,
}

impl Daemon {
    async fn start() -> Self {
        Self::start_in(tempfile::tempdir().unwrap()).await
    }

    async fn start_in(dir: tempfile::TempDir) -> Self {
        let operations = Operations::start_in(dir.path(), 2).await.unwrap();
        let socket = dir.path().join("api.sock");
        let server = Server::bind(&socket, operations.clone()).unwrap();
        let (stop, stopped) = oneshot::channel();
        let serving = tokio::spawn(async move {
            let _ = server.run_until(stopped).await;
        });
        Self {
            dir,
            socket,
            operations,
            stop,
            serving,
        }
    }

    async fn stop(self) -> tempfile::TempDir {
        drop(self.stop);
        self.serving.await.unwrap();
        self.operations.stop().await;
        // (A connection's task says that it has ended a moment before it lets go of what it had.)
        let alone = async {
            while Arc::strong_count(&self.operations) > 1 {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        let alone = tokio::time::timeout(Duration::from_secs(60), alone).await;
        assert!(alone.is_ok(), "nothing keeps the daemon alive");
        self.dir
    }

    async fn call(&self, method: &str, path: &str, body: &[u8]) -> (u16, Vec<u8>) {
        let head = format!(
            "{method} {path} HTTP/1.1\r\nhost: vold\r\nconnection: close\r\ncontent-length: {}\r\n\r\n",
            body.len()
        );
        exchange(&self.socket, &[head.as_bytes(), body].concat()).await
    }

    async fn ok<T: DeserializeOwned>(&self, method: &str, path: &str, body: Value) -> T {
        let bytes = if body.is_null() {
            Vec::new()
        } else {
            body.to_string().into_bytes()
        };
        let (status, answer) = self.call(method, path, &bytes).await;
        assert_eq!(
            status,
            200,
            "{method} {path}: {}",
            String::from_utf8_lossy(&answer)
        );
        serde_json::from_slice(&answer).unwrap()
    }

    async fn refused(&self, method: &str, path: &str, body: impl AsRef<[u8]>) -> (u16, String, String) {
        let (status, answer) = self.call(method, path, body.as_ref()).await;
        let text = String::from_utf8_lossy(&answer);
        let body: ErrorBody =
            serde_json::from_slice(&answer).unwrap_or_else(|e| panic!("{method} {path}: {e}: {text}"));
        assert!(!body.error.message.contains('\n'), "one line: {text}");
        (status, body.error.code, body.error.message)
    }
}

async fn exchange(socket: &Path, request: &[u8]) -> (u16, Vec<u8>) {
    let mut stream = UnixStream::connect(socket).await.unwrap();
    // The daemon may answer, and close, before it has read all of a refused body.
    let _ = stream.write_all(request).await;
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer).await;
    let head_end = answer
        .windows(4)
        .position(|w| w == b"\r\n\r\n")
        .map_or(answer.len(), |at| at + 4);
    let head = String::from_utf8_lossy(&answer[..head_end]).into_owned();
    let status = head
        .split(' ')
        .nth(1)
        .and_then(|code| code.parse().ok())
        .unwrap_or(0);
    (status, answer[head_end..].to_vec())
}

#[tokio::test(flavor = "multi_thread")]
async fn customers_and_vms_are_made_listed_and_kept_over_a_restart() {
    let daemon = Daemon::start().await;
    let acme: control::Customer = daemon.ok("POST", "/v1/customers", json!({"name": "acme"})).await;
    assert_eq!((acme.name.as_str(), acme.vms, acme.volumes), ("acme", 0, 0));
    let vm: control::Vm = daemon
        .ok(
            "POST",
            "/v1/vms",
            json!({"name": "web-1", "customer": "acme", "uid": 4242}),
        )
        .await;
    assert_eq!((vm.customer.as_str(), vm.uid), ("acme", 4242));
    let own: control::Vm = daemon
        .ok("POST", "/v1/vms", json!({"name": "web-2", "customer": "acme"}))
        .await;
    assert_eq!(own.uid, crate::process::own_uid(), "the caller's uid");
    let dir = daemon.stop().await;
    let daemon = Daemon::start_in(dir).await;
    let vms: List<control::Vm> = daemon.ok("GET", "/v1/vms", Value::Null).await;
    let names: Vec<_> = vms.items.iter().map(|vm| vm.name.as_str()).collect();
    assert_eq!(names, ["web-1", "web-2"]);
    let acme: control::Customer = daemon.ok("GET", "/v1/customers/acme", Value::Null).await;
    assert_eq!(acme.vms, 2);
    let _: control::Done = daemon.ok("DELETE", "/v1/vms/web-1", Value::Null).await;
    assert_eq!(daemon.refused("GET", "/v1/vms/web-1", "").await.0, 404);
    let status: control::Status = daemon.ok("GET", "/v1/status", Value::Null).await;
    assert_eq!((status.customers, status.vms, status.volumes), (1, 1, 0));
    assert_eq!((status.io_engine.as_str(), status.shards), ("threads", 2));
    assert!(status.warnings.is_empty(), "{:?}", status.warnings);
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_refusal_is_json_with_a_code_and_one_line() {
    let daemon = Daemon::start().await;
    let _: control::Customer = daemon.ok("POST", "/v1/customers", json!({"name": "acme"})).await;
    let too_long = vec![b' '; libvol::limits::API_BODY_BYTES_MAX + 1];
    let too_long = String::from_utf8(too_long).unwrap();
    let id = uuid::Uuid::nil().to_string();
    let destroy = format!("/v1/destroys/{id}");
    let table: &[(&str, &str, &str, u16, &str)] = &[
        // call, body → status, code
        ("GET", "/", "", 404, "not_found"),
        ("GET", "/v2/status", "", 404, "not_found"),
        ("GET", "/v1/status/", "", 404, "not_found"),
        ("PUT", "/v1/status", "", 405, "invalid"),
        ("DELETE", "/v1/customers", "", 405, "invalid"),
        ("POST", "/v1/customers", "", 400, "invalid"),
        ("POST", "/v1/customers", "\0\u{1}garbage", 400, "invalid"),
        ("POST", "/v1/customers", "[]", 400, "invalid"),
        (
            "POST",
            "/v1/customers",
            "{\"name\":\"x\",\"admin\":true}",
            400,
            "invalid",
        ),
        ("POST", "/v1/customers", "{\"name\":\"Acme\"}", 400, "invalid"),
        ("POST", "/v1/customers", "{\"name\":\"../acme\"}", 400, "invalid"),
        ("POST", "/v1/customers", "{\"name\":\"acme\"}", 409, "exists"),
        ("POST", "/v1/customers", &too_long, 413, "invalid"),
        ("GET", "/v1/customers/globex", "", 404, "not_found"),
        ("GET", "/v1/customers/%ff", "", 400, "invalid"),
        ("GET", "/v1/customers/..%2f", "", 400, "invalid"),
        (
            "POST",
            "/v1/vms",
            "{\"name\":\"v\",\"customer\":\"globex\"}",
            404,
            "not_found",
        ),
        (
            "POST",
            "/v1/vms",
            "{\"name\":\"v\",\"customer\":\"acme\",\"uid\":-1}",
            400,
            "invalid",
        ),
        ("DELETE", "/v1/vms/v", "", 404, "not_found"),
        (
            "POST",
            "/v1/stores",
            "{\"name\":\"s\",\"path\":\"relative\",\"size_bytes\":1073741824}",
            400,
            "invalid",
        ),
        (
            "POST",
            "/v1/stores",
            "{\"name\":\"s\",\"path\":\"/x/../y\",\"size_bytes\":1073741824}",
            400,
            "invalid",
        ),
        (
            "POST",
            "/v1/stores",
            "{\"name\":\"s\",\"path\":\"/nowhere/s\",\"size_bytes\":4096}",
            400,
            "invalid",
        ),
        (
            "POST",
            "/v1/stores",
            "{\"name\":\"s\",\"path\":\"/nowhere/s\"}",
            400,
            "invalid",
        ),
        (
            "POST",
            "/v1/stores",
            "{\"name\":\"s\",\"path\":\"/nowhere/s\",\"size_bytes\":1073741824}",
            404,
            "not_found",
        ),
        (
            "POST",
            "/v1/stores",
            "{\"name\":\"s\",\"path\":\"/etc/passwd\",\"size_bytes\":1073741824}",
            409,
            "exists",
        ),
        (
            "POST",
            "/v1/stores",
            "{\"name\":\"s\",\"path\":\"/x\",\"size_bytes\":1073741824,\"extent_bytes\":3}",
            400,
            "invalid",
        ),
        ("DELETE", "/v1/stores/s", "", 404, "not_found"),
        (
            "POST",
            "/v1/volumes",
            "{\"volume\":\"acme/web\",\"size_bytes\":0}",
            400,
            "invalid",
        ),
        (
            "POST",
            "/v1/volumes",
            "{\"volume\":\"acme/web\",\"size_bytes\":4097}",
            400,
            "invalid",
        ),
        (
            "POST",
            "/v1/volumes",
            "{\"volume\":\"acme/web\",\"size_bytes\":18446744073709547520}",
            400,
            "invalid",
        ),
        (
            "POST",
            "/v1/volumes",
            "{\"volume\":\"acme\",\"size_bytes\":4096}",
            400,
            "invalid",
        ),
        (
            "POST",
            "/v1/volumes",
            "{\"volume\":\"globex/web\",\"size_bytes\":4096}",
            404,
            "not_found",
        ),
        (
            "POST",
            "/v1/volumes",
            "{\"volume\":\"acme/web\",\"size_bytes\":4096}",
            507,
            "no_space",
        ),
        (
            "POST",
            "/v1/volumes",
            "{\"volume\":\"acme/web\",\"size_bytes\":4096,\"replicas\":4}",
            400,
            "invalid",
        ),
        ("GET", "/v1/volumes/acme/web", "", 404, "not_found"),
        (
            "POST",
            "/v1/volumes/acme/web/resize",
            "{\"size_bytes\":8192}",
            404,
            "not_found",
        ),
        ("DELETE", "/v1/volumes/acme/web?now=true", "", 404, "not_found"),
        ("DELETE", "/v1/volumes/acme/web?now=maybe", "", 400, "invalid"),
        ("DELETE", "/v1/volumes/acme/web?force=true", "", 400, "invalid"),
        (
            "POST",
            "/v1/attachments",
            "{\"volume\":\"acme/web\",\"vm\":\"v\"}",
            404,
            "not_found",
        ),
        (
            "POST",
            "/v1/attachments",
            "{\"volume\":\"acme/web\",\"vm\":\"v\",\"via\":\"iscsi\"}",
            400,
            "invalid",
        ),
        (
            "POST",
            "/v1/attachments",
            "{\"volume\":\"acme/web\",\"vm\":\"v\",\"via\":\"vhost-user\"}",
            404,
            "not_found",
        ),
        (
            "POST",
            "/v1/detach",
            "{\"volume\":\"acme/web\",\"vm\":\"v\"}",
            404,
            "not_found",
        ),
        ("GET", "/v1/destroys/not-an-id", "", 400, "invalid"),
        ("GET", &destroy, "", 404, "not_found"),
    ];
    for (method, path, body, status, code) in table {
        let (was, its_code, message) = daemon.refused(method, path, body).await;
        assert_eq!(
            (was, its_code.as_str()),
            (*status, *code),
            "{method} {path} {:.80}: {message}",
            body
        );
    }
    // Nothing of it was half done.
    let status: control::Status = daemon.ok("GET", "/v1/status", Value::Null).await;
    assert_eq!(
        (status.customers, status.vms, status.volumes, status.stores.len()),
        (1, 0, 0, 0)
    );
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn garbage_on_the_socket_ends_that_connection_and_nothing_else() {
    let daemon = Daemon::start().await;
    for garbage in [
        &b"\0\0\0\0\r\n\r\n"[..],
        b"NBDMAGICIHAVEOPT\r\n\r\n",
        &[0xff; 70_000],
        b"GET\r\n\r\n",
    ] {
        let (status, _) = exchange(&daemon.socket, garbage).await;
        assert!(matches!(status, 0 | 400..=499), "{status}");
    }
    let version: control::Version = daemon.ok("GET", "/v1/version", Value::Null).await;
    assert_eq!(version.version, env!("CARGO_PKG_VERSION"));
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_wanted_by_many_at_once_goes_to_one() {
    let daemon = Arc::new(Daemon::start().await);
    let mut calls = tokio::task::JoinSet::new();
    for _ in 0..8 {
        let daemon = daemon.clone();
        calls.spawn(async move {
            daemon
                .call("POST", "/v1/customers", b"{\"name\":\"acme\"}")
                .await
                .0
        });
    }
    let mut statuses = calls.join_all().await;
    statuses.sort_unstable();
    assert_eq!(statuses, [200, 409, 409, 409, 409, 409, 409, 409]);
    let customers: List<control::Customer> = daemon.ok("GET", "/v1/customers", Value::Null).await;
    assert_eq!(customers.items.len(), 1);
    Arc::into_inner(daemon).unwrap().stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_beyond_the_limit_wait_and_are_served_when_there_is_room() {
    let daemon = Daemon::start().await;
    let mut idle = Vec::new();
    for _ in 0..80 {
        idle.push(UnixStream::connect(&daemon.socket).await.unwrap());
    }
    let request = b"GET /v1/version HTTP/1.1\r\nhost: vold\r\nconnection: close\r\n\r\n";
    let mut last = UnixStream::connect(&daemon.socket).await.unwrap();
    last.write_all(request).await.unwrap();
    let mut byte = [0];
    let early = tokio::time::timeout(Duration::from_millis(50), last.read(&mut byte)).await;
    assert!(early.is_err(), "it waits");
    drop(idle);
    let mut answer = String::new();
    last.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    daemon.stop().await;
}
