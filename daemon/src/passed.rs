//! Listening sockets that whoever started the daemon has bound (`LISTEN_FDS`): TCP for NBD over TLS, and Unix sockets, each named
//! after the volume (`FileDescriptorName=CUSTOMER/NAME`, `LISTEN_FDNAMES`) to whose attachment it leads.
//!
//! A passed Unix socket is one more way to the volume's attachment, beside the attachment's own socket, and outlives both
//! attachment and daemon: who connects while there is no daemon waits. Who waits when a volume is attached anew is turned away,
//! and after a move (`attach --incoming`) the socket leads nowhere until then: it may be whoever had the volume before. Owner and
//! mode are whoever's who made it; who is let in is decided as everywhere, by the peer's uid (I2).

use std::collections::HashMap;
use std::net::TcpListener;
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::sync::mpsc;

use libvol::ids::VolumePath;
use libvol::{Error, Kind, Result};
use rustix::net::sockopt::{socket_acceptconn, socket_domain, socket_type};
use rustix::net::{AddressFamily, SocketType};

/// Connections that can wait at a socket (net.core.somaxconn, since Linux 5.4).
const BACKLOG_MAX: usize = 4096;

/// Unix sockets by volume.
#[derive(Default)]
pub(crate) struct PassedDoors(HashMap<VolumePath, UnixListener>);

impl PassedDoors {
    /// The socket that leads to a volume.
    ///
    /// # Errors
    /// Out of descriptors.
    pub(crate) fn of(&self, volume: &VolumePath) -> Result<Option<UnixListener>> {
        let listener = self.0.get(volume).map(UnixListener::try_clone).transpose();
        listener.map_err(|e| Error::with_source(Kind::Io, format!("the passed socket of volume {volume}"), e))
    }

    /// Closes the connections that wait at a volume's socket, on a thread of its own: they may hold anything.
    pub(crate) fn turn_away_waiting(&self, volume: &VolumePath) {
        let Some(listener) = self.0.get(volume) else {
            return;
        };
        let waiting = std::iter::from_fn(|| listener.accept().ok());
        // (Who comes while this goes on was not there before.)
        let waiting: Vec<_> = waiting.take(BACKLOG_MAX).collect();
        if waiting.is_empty() {
            return;
        }
        tracing::info!(%volume, "{} connections from before the attachment are turned away", waiting.len());
        let (sender, receiver) = mpsc::channel();
        let thread = std::thread::Builder::new().name("closer".into());
        let started = thread.spawn(move || drop(receiver.recv()));
        if let Err(e) = started {
            tracing::error!("connections stay open, there is no thread to close them: {e}");
            std::mem::forget(waiting);
        } else if let Err(back) = sender.send(waiting) {
            std::mem::forget(back);
        }
    }
}

/// Takes them over.
///
/// # Errors
/// `Invalid`: one is no listening socket, or of another kind, or is named after no volume, or two are after one.
pub(crate) fn take() -> Result<(Vec<TcpListener>, PassedDoors)> {
    let passed = sd_notify::listen_fds_with_names()
        .map_err(|e| Error::with_source(Kind::Invalid, "sockets of the service manager", e))?;
    // SAFETY: the protocol of LISTEN_FDS gives these descriptors to this process, and this is asked once.
    sorted(passed.map(|(fd, name)| (unsafe { OwnedFd::from_raw_fd(fd) }, name)))
}

fn sorted(passed: impl Iterator<Item = (OwnedFd, String)>) -> Result<(Vec<TcpListener>, PassedDoors)> {
    let (mut tcp, mut doors) = (Vec::new(), HashMap::new());
    for (index, (socket, name)) in passed.enumerate() {
        let invalid = |what: &str| {
            Error::invalid(format!(
                "socket {index} of the service manager, named {name:?}: {what}"
            ))
        };
        let is_stream = socket_type(&socket) == Ok(SocketType::STREAM);
        if !is_stream || !socket_acceptconn(&socket).unwrap_or(false) {
            return Err(invalid("it is no listening stream socket"));
        }
        match socket_domain(&socket) {
            Ok(AddressFamily::INET | AddressFamily::INET6) => tcp.push(TcpListener::from(socket)),
            Ok(AddressFamily::UNIX) => {
                let listener = UnixListener::from(socket);
                let is_file = listener.local_addr().is_ok_and(|at| at.as_pathname().is_some());
                if !is_file {
                    return Err(invalid(
                        "it has no path; abstract names are not taken, since anybody could take the name",
                    ));
                }
                let volume: VolumePath = name.parse().map_err(|_| {
                    invalid("a Unix socket is named after the volume it leads to: FileDescriptorName=CUSTOMER/NAME")
                })?;
                if let Err(e) = listener.set_nonblocking(true) {
                    return Err(invalid(&e.to_string()));
                }
                if doors.insert(volume, listener).is_some() {
                    return Err(invalid("another one leads to the same volume"));
                }
            }
            _ => return Err(invalid("it is neither a TCP nor a Unix socket")),
        }
    }
    Ok((tcp, PassedDoors(doors)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::linux::net::SocketAddrExt;
    use std::os::unix::net::{SocketAddr, UnixDatagram, UnixStream};

    fn refusal(socket: impl Into<OwnedFd>, name: &str) -> String {
        let passed = [(socket.into(), name.to_owned())];
        sorted(passed.into_iter()).map(drop).unwrap_err().to_string()
    }

    #[test]
    fn sockets_are_told_apart_by_kind_and_unix_sockets_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let unix = |name: &str| OwnedFd::from(UnixListener::bind(dir.path().join(name)).unwrap());
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        let passed = [
            (unix("a"), "acme/web".to_owned()),
            (tcp.into(), "unknown".to_owned()),
            (unix("b"), "acme/db".to_owned()),
        ];
        let (tcp, doors) = sorted(passed.into_iter()).unwrap();
        assert_eq!((tcp.len(), doors.0.len()), (1, 2));
        let db = doors.of(&"acme/db".parse().unwrap()).unwrap().unwrap();
        assert!(db.local_addr().unwrap().as_pathname().unwrap().ends_with("b"));
        assert!(doors.of(&"globex/db".parse().unwrap()).unwrap().is_none());
        let two = [
            (unix("c"), "acme/web".to_owned()),
            (unix("d"), "acme/web".to_owned()),
        ];
        let two = sorted(two.into_iter()).map(drop).unwrap_err().to_string();
        assert!(two.contains("the same volume"), "{two}");
    }

    #[test]
    fn what_leads_nowhere_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let unix = UnixListener::bind(dir.path().join("a")).unwrap();
        let text = refusal(unix, "connection");
        assert!(
            text.contains("\"connection\"") && text.contains("CUSTOMER/NAME"),
            "{text}"
        );
        let (connected, _other) = UnixStream::pair().unwrap();
        assert!(refusal(connected, "acme/web").contains("no listening stream"));
        assert!(refusal(UnixDatagram::unbound().unwrap(), "acme/web").contains("no listening stream"));
        let name = format!("vold-test-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(name).unwrap();
        let text = refusal(UnixListener::bind_addr(&address).unwrap(), "acme/web");
        assert!(text.contains("abstract"), "{text}");
    }
}
