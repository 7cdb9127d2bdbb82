//! Who calls: the kernel's word on the peer of the Unix socket.

use axum::extract::connect_info::Connected;
use axum::extract::{ConnectInfo, Request};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use axum::serve::IncomingStream;
use libvol::{Error, tenant};

use super::limit::Limited;
use super::reply::Failure;
use crate::process::own_uid;

/// The caller's uid; `None` when the kernel did not tell, which nobody gets by with.
#[derive(Clone, Copy, Debug)]
pub(super) struct Peer {
    uid: Option<u32>,
}

impl Connected<IncomingStream<'_, Limited>> for Peer {
    fn connect_info(stream: IncomingStream<'_, Limited>) -> Self {
        Self {
            uid: stream.io().peer_cred().ok().map(|credentials| credentials.uid()),
        }
    }
}

impl Peer {
    /// Whoever a fuzz target says that calls.
    #[cfg(any(test, feature = "fuzzing"))]
    pub(super) fn said_to_be(uid: Option<u32>) -> Self {
        Self { uid }
    }

    /// The caller's uid.
    pub(super) fn uid(self) -> u32 {
        self.uid.expect("admitted only with a uid")
    }
}

/// Lets operators through, and nobody else.
pub(super) async fn admit(ConnectInfo(peer): ConnectInfo<Peer>, request: Request, next: Next) -> Response {
    match peer.uid {
        Some(uid) if tenant::is_operator(uid, own_uid()) => next.run(request).await,
        _ => Failure::from(Error::refused(
            "the API is for root and the user vold runs as; call it as one of them",
        ))
        .into_response(),
    }
}
