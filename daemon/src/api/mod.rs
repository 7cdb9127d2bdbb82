//! The control API: HTTP and JSON over a Unix socket, as [`libvol::control`] tables it.
//!
//! | file | job |
//! |---|---|
//! | [`limit`] | how many connections at once |
//! | [`peer`] | who calls, and whether they may |
//! | [`reply`] | results and every kind of failure as JSON |
//! | [`routes`] | one handler a line of the table |
//!
//! An operation runs as a task of its own: a caller who hangs up does not stop it half-way.

#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod fuzz;
mod limit;
mod peer;
mod reply;
mod routes;
#[cfg(test)]
mod tests;

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use libvol::Result;
use tokio::net::UnixListener;
use tokio::sync::oneshot;

use crate::operations::Operations;
use crate::process::path_error;
use limit::Limited;
use peer::Peer;

/// How long requests may take to end once the daemon stops.
const DRAIN: Duration = Duration::from_secs(10);

/// The API, bound.
pub(crate) struct Server {
    listener: UnixListener,
    path: PathBuf,
    operations: Arc<Operations>,
}

impl Server {
    /// Takes the socket. A stale one is replaced: the directory's lock says that nobody listens there.
    ///
    /// # Errors
    /// `Refused`, `Io`.
    pub(crate) fn bind(path: &Path, operations: Arc<Operations>) -> Result<Self> {
        match std::fs::remove_file(path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                return Err(path_error(path, "the stale API socket cannot be removed", e));
            }
            _ => {}
        }
        let listener =
            UnixListener::bind(path).map_err(|e| path_error(path, "the API socket cannot be made", e))?;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))
            .map_err(|e| path_error(path, "the API socket cannot be made private", e))?;
        Ok(Self {
            listener,
            path: path.to_owned(),
            operations,
        })
    }

    /// Serves until `stop` is done, then lets running requests end. Returns what `stop` returned.
    pub(crate) async fn run_until<T>(self, stop: impl Future<Output = T>) -> T {
        let app = routes::router(self.operations).into_make_service_with_connect_info::<Peer>();
        let (end, ended) = oneshot::channel::<()>();
        let mut serving = tokio::spawn(
            axum::serve(Limited::new(self.listener), app)
                .with_graceful_shutdown(async {
                    let _ = ended.await;
                })
                .into_future(),
        );
        let result = stop.await;
        drop(end);
        let _ = std::fs::remove_file(&self.path);
        if tokio::time::timeout(DRAIN, &mut serving).await.is_err() {
            tracing::warn!(
                "API requests still run after {} s; going on without them",
                DRAIN.as_secs()
            );
            serving.abort();
        }
        result
    }
}
