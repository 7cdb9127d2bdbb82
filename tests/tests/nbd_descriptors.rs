//! Descriptors that a client passes along hold nobody up.

use std::io::{IoSlice, Write};
use std::mem::MaybeUninit;
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use vold_tests::nbd::Client;
use vold_tests::vold::{Vold, parse_uri};

/// How long the passed socket's close would wait for its peer.
const LINGER: Duration = Duration::from_secs(600);

#[test]
fn a_passed_socket_that_lingers_is_refused_or_holds_up_nobody() {
    let vold = Vold::start();
    let uri = vold.with_volume(1, "256M", "64M");
    let (socket, _) = parse_uri(&uri);
    let stream = UnixStream::connect(&socket).unwrap();
    // Unsent data and a peer that takes none: closing the last descriptor waits.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let passed = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (_peer, _) = listener.accept().unwrap();
    rustix::net::sockopt::set_socket_linger(&passed, Some(LINGER)).unwrap();
    passed.set_nonblocking(true).unwrap();
    while (&passed).write(&[0; 65536]).is_ok() {}
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let descriptors = [passed.as_fd()];
    assert!(ancillary.push(SendAncillaryMessage::ScmRights(&descriptors)));
    let sent = sendmsg(
        &stream,
        &[IoSlice::new(&[0; 4])],
        &mut ancillary,
        SendFlags::empty(),
    );
    if kernel_can_refuse() {
        assert_eq!(sent, Err(rustix::io::Errno::PERM));
    }
    // This process would wait too.
    rustix::net::sockopt::set_socket_linger(&passed, None).unwrap();
    drop(passed);
    drop(stream);
    let began = Instant::now();
    let mut other = Client::connect(&uri);
    other.write(0, &[7; 4096]).unwrap();
    assert_eq!(other.read(0, 4096).unwrap(), [7; 4096]);
    assert!(
        !kernel_can_refuse() || began.elapsed() < LINGER / 2,
        "nobody waited for it"
    );
}

/// Linux 6.16 and later.
fn kernel_can_refuse() -> bool {
    let name = rustix::system::uname();
    let release = name.release().to_string_lossy().into_owned();
    let mut numbers = release
        .split(['.', '-'])
        .map_while(|part| part.parse::<u32>().ok());
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0)) >= (6, 16)
}
