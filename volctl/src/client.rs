//! The way to the daemon: HTTP/1.1 with JSON bodies over a Unix socket, one connection a request.
//!
//! Every answer ends as the type asked for or as a [`Failure`] with one line that names the socket or the thing, the
//! reason and the next step. An answer is read up to [`ANSWER_BYTES_MAX`]; a daemon that never answers is given up
//! after [`ANSWER_SECONDS_MAX`]. Nothing is retried: the daemon may have done what it could not say.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::body::Bytes;
use hyper::{Method, Request, StatusCode, header};
use hyper_util::rt::TokioIo;
use libvol::Kind;
use libvol::control::ErrorBody;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;

use crate::failure::Failure;

/// Longest answer read. A volume is about 600 bytes of JSON, so this is some 400,000 of them, past any list that an
/// operator can use.
const ANSWER_BYTES_MAX: usize = 256 << 20;
/// Longest wait for an answer: making a store on a slow device is the slowest request.
const ANSWER_SECONDS_MAX: u64 = 600;

/// Where the daemon's API is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Api {
    socket: PathBuf,
}

impl Api {
    /// `unix:PATH`.
    ///
    /// # Errors
    /// One line: what is wrong with the address and what to write.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        if text.starts_with("https://") || text.starts_with("http://") {
            return Err("the API over TCP is not in this build; use unix:PATH on the daemon's host".into());
        }
        match text.strip_prefix("unix:") {
            Some(path) if !path.is_empty() => Ok(Self { socket: path.into() }),
            _ => Err("write unix:PATH, for example unix:/var/lib/vold/api.sock".into()),
        }
    }
}

/// A client of one daemon.
#[derive(Clone, Debug)]
pub(crate) struct Client {
    api: Api,
    answer_timeout: Duration,
}

impl Client {
    /// A client; nothing is connected yet.
    pub(crate) fn new(api: Api) -> Self {
        Self {
            api,
            answer_timeout: Duration::from_secs(ANSWER_SECONDS_MAX),
        }
    }

    /// `GET path`.
    ///
    /// # Errors
    /// The daemon's refusal, or why it could not be asked.
    pub(crate) async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, Failure> {
        self.call(Method::GET, path, Bytes::new()).await
    }

    /// `POST path` with a JSON body.
    ///
    /// # Errors
    /// As [`Client::get`].
    pub(crate) async fn post<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl Serialize,
    ) -> Result<T, Failure> {
        let body =
            serde_json::to_vec(body).expect("API types have string keys and cannot fail to be written");
        self.call(Method::POST, path, body.into()).await
    }

    /// `DELETE path`.
    ///
    /// # Errors
    /// As [`Client::get`].
    pub(crate) async fn delete<T: DeserializeOwned>(&self, path: &str) -> Result<T, Failure> {
        self.call(Method::DELETE, path, Bytes::new()).await
    }

    async fn call<T: DeserializeOwned>(&self, method: Method, path: &str, body: Bytes) -> Result<T, Failure> {
        let asked = format!("{method} {path}");
        let exchange = self.exchange(method, path, body);
        let (status, answer) = tokio::time::timeout(self.answer_timeout, exchange).await.map_err(|_| {
            let seconds = self.answer_timeout.as_secs();
            let text = format!(
                "{}: no answer to {asked} within {seconds} s; the daemon may still carry it out: look with \
                 `volctl status`, and at the daemon's log",
                self.socket().display()
            );
            Failure::new(Kind::Unavailable, text)
        })??;
        understand(&asked, status, &answer)
    }

    /// Sends one request and reads the whole answer.
    async fn exchange(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> Result<(StatusCode, Bytes), Failure> {
        let stream = UnixStream::connect(self.socket())
            .await
            .map_err(|e| unreachable_daemon(self.socket(), &e))?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|e| self.broken_off(&e))?;
        // The connection's task ends by itself when the sender is gone; its error also reaches the request.
        tokio::spawn(async move {
            let _ = connection.await;
        });
        let mut request = Request::builder()
            .method(method)
            .uri(path)
            .header(header::HOST, "vold")
            .header(header::USER_AGENT, concat!("volctl/", env!("CARGO_PKG_VERSION")));
        if !body.is_empty() {
            request = request.header(header::CONTENT_TYPE, "application/json");
        }
        let request = request
            .body(Full::new(body))
            .expect("paths are made of checked names and ids");
        let answer = sender
            .send_request(request)
            .await
            .map_err(|e| self.broken_off(&e))?;
        let status = answer.status();
        let body = Limited::new(answer.into_body(), ANSWER_BYTES_MAX)
            .collect()
            .await
            .map_err(|e| {
                if e.is::<LengthLimitError>() {
                    let text = format!(
                        "the answer is longer than {} MiB; ask for less",
                        ANSWER_BYTES_MAX >> 20
                    );
                    return Failure::new(Kind::Internal, text);
                }
                self.broken_off(&*e)
            })?;
        Ok((status, body.to_bytes()))
    }

    fn socket(&self) -> &Path {
        &self.api.socket
    }

    fn broken_off(&self, error: &dyn std::error::Error) -> Failure {
        let text = format!(
            "{}: the daemon broke off before it had answered ({error}); the request may or may not have been carried \
             out: look with `volctl status`",
            self.socket().display()
        );
        Failure::new(Kind::Unavailable, text)
    }
}

/// Why nobody answers at the socket.
fn unreachable_daemon(socket: &Path, error: &io::Error) -> Failure {
    let shown = socket.display();
    let text = match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => format!(
            "no vold is running at {shown}; start it with `vold serve --data-dir DIR`, or name its socket with \
             --api unix:DIR/api.sock"
        ),
        io::ErrorKind::PermissionDenied => {
            format!("{shown}: permission denied; run volctl as root or as the user that vold runs as")
        }
        _ => format!("{shown}: cannot connect: {error}; is it the api.sock of a running `vold serve`?"),
    };
    Failure::new(Kind::Unavailable, text)
}

/// An answer as the type asked for, or the refusal it holds.
fn understand<T: DeserializeOwned>(asked: &str, status: StatusCode, answer: &[u8]) -> Result<T, Failure> {
    let foreign = |problem: String| {
        let version = env!("CARGO_PKG_VERSION");
        let text = format!("{asked}: {problem}; does volctl {version} fit the daemon (`volctl version`)?");
        Failure::new(Kind::Internal, text)
    };
    if status.is_success() {
        return serde_json::from_slice(answer)
            .map_err(|e| foreign(format!("the answer cannot be understood ({e})")));
    }
    match serde_json::from_slice::<ErrorBody>(answer) {
        Ok(body) => Err(Failure::from_daemon(&body.error.code, &body.error.message)),
        Err(_) => {
            let start: String = String::from_utf8_lossy(answer).chars().take(120).collect();
            Err(foreign(format!("HTTP status {} and {start:?}", status.as_u16())))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::FakeDaemon;
    use libvol::control::{Done, Version, VmCreate};

    fn client(fake: &FakeDaemon) -> Client {
        Client::new(Api::parse(&fake.api()).unwrap())
    }

    fn run<T>(work: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap()
            .block_on(work)
    }

    #[test]
    fn an_answer_becomes_the_type_asked_for() {
        let fake = FakeDaemon::answering(
            200,
            r#"{"version":"9.8.7","store_format":1,"io_engine":"threads"}"#,
        );
        let version: Version = run(client(&fake).get("/v1/version")).unwrap();
        assert_eq!((version.version.as_str(), version.store_format), ("9.8.7", 1));
        let request = fake.request();
        assert!(request.starts_with("GET /v1/version HTTP/1.1\r\n"), "{request}");
    }

    #[test]
    fn a_post_carries_the_json_of_its_type() {
        let fake = FakeDaemon::answering(200, "{}");
        let body = VmCreate {
            name: "vm1".parse().unwrap(),
            customer: "acme".parse().unwrap(),
            uid: Some(64055),
        };
        let _: Done = run(client(&fake).post("/v1/vms", &body)).unwrap();
        let request = fake.request().to_lowercase();
        assert!(request.contains("content-type: application/json"), "{request}");
        assert!(
            request.ends_with(r#"{"name":"vm1","customer":"acme","uid":64055}"#),
            "{request}"
        );
    }

    #[test]
    fn a_refusal_keeps_the_daemons_code_and_line() {
        let fake = FakeDaemon::answering(
            409,
            r#"{"error":{"code":"busy","message":"volume \"acme/web\" is attached"}}"#,
        );
        let failure = run(client(&fake).delete::<Done>("/v1/volumes/acme/web")).unwrap_err();
        assert_eq!(
            (failure.code(), failure.message()),
            ("busy", r#"volume "acme/web" is attached"#)
        );
    }

    #[test]
    fn an_error_that_is_not_volds_is_shown_with_its_status() {
        let fake = FakeDaemon::answering(404, "nothing\nhere");
        let failure = run(client(&fake).get::<Done>("/v1/x")).unwrap_err();
        assert_eq!(failure.code(), "internal");
        assert!(
            failure
                .message()
                .contains(r#"GET /v1/x: HTTP status 404 and "nothing\nhere""#),
            "{failure:?}"
        );
    }

    #[test]
    fn an_answer_of_another_shape_is_a_failure_not_a_panic() {
        for answer in ["", "[]", "{", r#"{"version":1}"#, "\u{0}\u{1}"] {
            let fake = FakeDaemon::answering(200, answer);
            let failure = run(client(&fake).get::<Version>("/v1/version")).unwrap_err();
            assert!(
                failure.message().contains("cannot be understood"),
                "{answer:?}: {failure:?}"
            );
        }
    }

    #[test]
    fn a_peer_that_does_not_speak_http_or_hangs_up_is_a_failure() {
        for bytes in [
            &b"NBDMAGICIHAVEOPT"[..],
            b"",
            b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{",
        ] {
            let fake = FakeDaemon::sending(bytes);
            let failure = run(client(&fake).get::<Done>("/v1/status")).unwrap_err();
            assert!(failure.message().contains("broke off"), "{failure:?}");
            assert_eq!(failure.code(), "unavailable");
        }
    }

    #[test]
    fn a_daemon_that_never_answers_is_given_up() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("api.sock");
        let _silent = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let mut client = Client::new(Api { socket: path });
        client.answer_timeout = Duration::from_millis(50);
        let failure = run(client.get::<Done>("/v1/status")).unwrap_err();
        assert!(
            failure.message().contains("no answer to GET /v1/status"),
            "{failure:?}"
        );
    }

    #[test]
    fn a_daemon_that_is_not_running_is_named_with_the_command_that_starts_it() {
        let directory = tempfile::tempdir().unwrap();
        let missing = directory.path().join("api.sock");
        let stale = directory.path().join("stale.sock");
        drop(std::os::unix::net::UnixListener::bind(&stale).unwrap());
        for socket in [missing, stale] {
            let shown = socket.display().to_string();
            let failure = run(Client::new(Api { socket }).get::<Done>("/v1/status")).unwrap_err();
            assert!(failure.message().contains(&shown), "{failure:?}");
            assert!(
                failure.message().contains("`vold serve --data-dir DIR`"),
                "{failure:?}"
            );
        }
    }

    #[test]
    fn a_socket_path_that_cannot_be_one_is_a_failure() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("plain");
        std::fs::write(&file, b"").unwrap();
        for socket in [
            PathBuf::from(format!("/{}", "x".repeat(200))),
            directory.path().to_owned(),
            file,
        ] {
            let failure = run(Client::new(Api { socket }).get::<Done>("/v1/status")).unwrap_err();
            assert_eq!(failure.code(), "unavailable");
        }
    }

    #[test]
    fn only_unix_addresses_are_taken() {
        assert_eq!(
            Api::parse("unix:/run/v.sock").unwrap().socket,
            Path::new("/run/v.sock")
        );
        assert!(
            Api::parse("https://host:1")
                .unwrap_err()
                .contains("not in this build")
        );
        for bad in ["", "unix:", "/run/v.sock", "tcp:1"] {
            assert!(Api::parse(bad).unwrap_err().contains("unix:PATH"), "{bad}");
        }
    }
}
