//! Requests in, results and failures out, always as JSON: a known kind has its HTTP status, and what the HTTP layer
//! itself refuses (a body too long, a path that is not UTF-8) gets the same shape.

use axum::Json;
use axum::body::Bytes;
use axum::extract::rejection::{BytesRejection, PathRejection, QueryRejection};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use libvol::control::ErrorBody;
use libvol::limits::API_BODY_BYTES_MAX;
use libvol::{Error, Kind};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// An error on its way out.
#[derive(Debug)]
pub(super) struct Failure {
    error: Error,
    status: StatusCode,
}

/// What a handler returns.
pub(super) type Reply<T> = Result<Json<T>, Failure>;

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self {
            status: status(error.kind()),
            error,
        }
    }
}

impl Failure {
    /// An error with another status than its kind's.
    pub(super) fn with_status(status: StatusCode, error: Error) -> Self {
        Self { error, status }
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let Self { error, status } = self;
        // An operator's request refused is the caller's to read; a device or a promise that failed is the log's, too.
        match error.kind() {
            Kind::Io | Kind::Damaged | Kind::Internal => tracing::error!("request failed: {error}"),
            _ => tracing::debug!("request refused: {error}"),
        }
        // One line, whatever a source said.
        let line = error.to_string().replace('\n', " ");
        (status, Json(ErrorBody::new(error.kind(), line))).into_response()
    }
}

fn status(kind: Kind) -> StatusCode {
    match kind {
        Kind::Invalid => StatusCode::BAD_REQUEST,
        Kind::Refused => StatusCode::FORBIDDEN,
        Kind::NotFound => StatusCode::NOT_FOUND,
        Kind::Exists | Kind::Busy | Kind::ReadOnly => StatusCode::CONFLICT,
        Kind::NoSpace => StatusCode::INSUFFICIENT_STORAGE,
        Kind::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
        Kind::Unsupported => StatusCode::NOT_IMPLEMENTED,
        Kind::Io | Kind::Damaged | Kind::Internal => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

/// A handler's result as JSON.
pub(super) fn json<T: Serialize>(result: libvol::Result<T>) -> Reply<T> {
    Ok(Json(result?))
}

/// The body as a request.
pub(super) fn parse<T: DeserializeOwned>(body: Result<Bytes, BytesRejection>) -> Result<T, Failure> {
    let bytes = body.map_err(|rejection| {
        let error = match rejection.status() {
            StatusCode::PAYLOAD_TOO_LARGE => Error::invalid(format!(
                "the request's body is longer than {} KiB",
                API_BODY_BYTES_MAX >> 10
            )),
            _ => Error::invalid("the request's body cannot be read"),
        };
        Failure::with_status(rejection.status(), error)
    })?;
    serde_json::from_slice(&bytes)
        .map_err(|e| Error::invalid(format!("the request's body is not what this call takes: {e}")).into())
}

/// A part of the path as a name or an id.
pub(super) fn part<T: std::str::FromStr<Err = Error>>(text: &str) -> Result<T, Failure> {
    Ok(text.parse()?)
}

impl From<PathRejection> for Failure {
    fn from(_: PathRejection) -> Self {
        Error::invalid("the request's path cannot be read; percent-encode UTF-8").into()
    }
}

impl From<QueryRejection> for Failure {
    fn from(rejection: QueryRejection) -> Self {
        Error::invalid(format!(
            "the request's query is not what this call takes: {}",
            rejection.body_text()
        ))
        .into()
    }
}
