//! A tiny HTTP server for the unit tests: real HTTP over a real Unix socket, with answers chosen by the test.
//!
//! It takes one request a connection and answers in the order given; the last answer repeats.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

/// A server on a socket of its own, until dropped.
pub(crate) struct FakeDaemon {
    directory: tempfile::TempDir,
    requests: Receiver<String>,
}

impl FakeDaemon {
    /// Answers every request with this status and body.
    pub(crate) fn answering(status: u16, body: &str) -> Self {
        Self::answering_in_turn(&[(status, body)])
    }

    /// Answers with each of these in turn, then with the last for ever.
    pub(crate) fn answering_in_turn(answers: &[(u16, &str)]) -> Self {
        let raw = answers.iter().map(|(status, body)| {
            let length = body.len();
            format!("HTTP/1.1 {status} x\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n{body}")
        });
        Self::start(raw.map(String::into_bytes).collect())
    }

    /// Answers with these bytes and hangs up.
    pub(crate) fn sending(bytes: &[u8]) -> Self {
        Self::start(vec![bytes.to_owned()])
    }

    /// Its address, as `--api` takes it.
    pub(crate) fn api(&self) -> String {
        format!("unix:{}", self.directory.path().join("api.sock").display())
    }

    /// The next request it got: head and body.
    pub(crate) fn request(&self) -> String {
        self.requests
            .recv_timeout(Duration::from_secs(30))
            .expect("a request reached the server")
    }

    fn start(answers: Vec<Vec<u8>>) -> Self {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let listener = UnixListener::bind(directory.path().join("api.sock")).expect("a socket in it");
        let (sender, requests) = channel();
        std::thread::spawn(move || serve(&listener, &answers, &sender));
        Self { directory, requests }
    }
}

impl Drop for FakeDaemon {
    /// Wakes the server's thread with a connection that asks nothing, which ends it.
    fn drop(&mut self) {
        let _ = UnixStream::connect(self.directory.path().join("api.sock"));
    }
}

fn serve(listener: &UnixListener, answers: &[Vec<u8>], requests: &Sender<String>) {
    let mut answers = answers.iter();
    let mut answer = answers.next().expect("at least one answer");
    while let Ok((mut stream, _)) = listener.accept() {
        let request = read_request(&mut stream);
        if request.is_empty() || requests.send(request).is_err() {
            return;
        }
        let _ = stream.write_all(answer);
        answer = answers.next().unwrap_or(answer);
    }
}

/// Reads head and body, as long as `content-length` says.
fn read_request(stream: &mut UnixStream) -> String {
    let mut bytes = Vec::new();
    let mut chunk = [0; 4096];
    loop {
        let text = String::from_utf8_lossy(&bytes).into_owned();
        if let Some((head, body)) = text.split_once("\r\n\r\n") {
            let length = head
                .to_lowercase()
                .lines()
                .find_map(|l| l.strip_prefix("content-length: ")?.parse().ok());
            if body.len() >= length.unwrap_or(0) {
                return text;
            }
        }
        match stream.read(&mut chunk) {
            Ok(n) if n > 0 => bytes.extend_from_slice(&chunk[..n]),
            _ => return text,
        }
    }
}
