//! The table of calls. A handler parses, runs its operation as a task, and answers.

use std::sync::Arc;

use axum::body::Bytes;
use axum::extract::rejection::{BytesRejection, PathRejection, QueryRejection};
use axum::extract::{ConnectInfo, DefaultBodyLimit, Path, Query, State};
use axum::http::{StatusCode, Uri};
use axum::routing::{get, post};
use axum::{Router, middleware};
use libvol::control::{self, Done, List};
use libvol::ids::{Name, VolumeId, VolumePath};
use libvol::limits::API_BODY_BYTES_MAX;
use libvol::{Error, Result};
use serde::{Deserialize, Serialize};

use super::peer::{Peer, admit};
use super::reply::{Failure, Reply, json, parse, part};
use crate::operations::Operations;

type Ops = State<Arc<Operations>>;
type Body = Result<Bytes, BytesRejection>;
type Caller = ConnectInfo<Peer>;
type One = Result<Path<String>, PathRejection>;
type Two = Result<Path<(String, String)>, PathRejection>;

/// All calls over `operations`.
pub(super) fn router(operations: Arc<Operations>) -> Router {
    Router::new()
        .route("/v1/version", get(version))
        .route("/v1/status", get(status))
        .route("/v1/stores", get(store_list).post(store_add))
        .route("/v1/stores/{name}", get(store_show).delete(store_remove))
        .route("/v1/stores/{name}/reopen", post(store_reopen))
        .route("/v1/stores/{name}/drain", post(store_drain))
        .route("/v1/customers", get(customer_list).post(customer_create))
        .route("/v1/customers/{customer}", get(customer_show))
        .route("/v1/vms", get(vm_list).post(vm_create))
        .route("/v1/vms/{vm}", get(vm_show).delete(vm_remove))
        .route("/v1/volumes", get(volume_list).post(volume_create))
        .route(
            "/v1/volumes/{customer}/{name}",
            get(volume_show).delete(volume_delete),
        )
        .route("/v1/volumes/{customer}/{name}/resize", post(volume_resize))
        .route("/v1/attachments", get(attachment_list).post(attach))
        .route("/v1/detach", post(detach))
        .route("/v1/scrubs", get(scrub_status).post(scrub_start))
        .route("/v1/audit", get(audit_list))
        .route("/v1/audit/verify", get(audit_verify))
        .route("/v1/destroys", get(destroy_list))
        .route("/v1/destroys/{volume_id}", get(destroy_show))
        .fallback(unknown_path)
        .method_not_allowed_fallback(wrong_method)
        .layer(DefaultBodyLimit::max(API_BODY_BYTES_MAX))
        .layer(middleware::from_fn(admit))
        .with_state(operations)
}

/// Runs an operation as a task of its own: it goes on to its end even if the caller hangs up, and a panic in it is an
/// answer rather than a cut connection.
async fn run<T, F>(operation: F) -> Reply<T>
where
    T: Serialize + Send + 'static,
    F: Future<Output = Result<T>> + Send + 'static,
{
    let ended = tokio::spawn(operation).await;
    json(ended.unwrap_or_else(|e| Err(Error::internal(format!("the operation did not end: {e}")))))
}

/// Runs an operation that changes something, and writes it down.
async fn act<T, F>(
    operations: Arc<Operations>,
    by: Caller,
    action: &'static str,
    on: impl ToString,
    operation: impl FnOnce(Arc<Operations>) -> F,
) -> Reply<T>
where
    T: Serialize + Send + 'static,
    F: Future<Output = Result<T>> + Send + 'static,
{
    let (uid, on) = (by.0.uid(), on.to_string());
    let operation = operation(operations.clone());
    run(async move {
        let ended = operation.await;
        tokio::task::block_in_place(|| operations.audit.called(uid, action, on, &ended));
        ended
    })
    .await
}

async fn unknown_path(uri: Uri) -> Failure {
    Error::not_found(format!(
        "there is no {} in this API; it has /v1/status and others",
        shortened(&uri)
    ))
    .into()
}

async fn wrong_method(uri: Uri) -> Failure {
    let error = Error::invalid(format!("{} does not take this method", shortened(&uri)));
    Failure::with_status(StatusCode::METHOD_NOT_ALLOWED, error)
}

fn shortened(uri: &Uri) -> String {
    uri.path().chars().take(200).collect()
}

fn list<T>(items: Result<Vec<T>>) -> Result<List<T>> {
    items.map(|items| List { items })
}

fn volume_path(parts: Two) -> Result<VolumePath, Failure> {
    let Path((customer, name)) = parts?;
    Ok(VolumePath {
        customer: part(&customer)?,
        name: part(&name)?,
    })
}

async fn version(State(operations): Ops) -> Reply<control::Version> {
    json(Ok(operations.version()))
}

async fn status(State(operations): Ops) -> Reply<control::Status> {
    run(async move { operations.status().await }).await
}

async fn store_add(State(operations): Ops, by: Caller, body: Body) -> Reply<control::Store> {
    let request: control::StoreAdd = parse(body)?;
    let on = request.name.to_string();
    act(operations, by, "store.add", on, |operations| async move {
        operations.store_add(request).await
    })
    .await
}

async fn store_reopen(State(operations): Ops, by: Caller, name: One) -> Reply<control::Store> {
    let name: Name = part(&name?)?;
    let on = name.to_string();
    act(operations, by, "store.reopen", on, |operations| async move {
        operations.store_reopen(&name).await
    })
    .await
}

async fn store_list(State(operations): Ops) -> Reply<List<control::Store>> {
    run(async move { list(operations.store_list()) }).await
}

async fn store_show(State(operations): Ops, name: One) -> Reply<control::Store> {
    let name: Name = part(&name?)?;
    run(async move { operations.store_show(&name) }).await
}

async fn store_drain(State(operations): Ops, by: Caller, name: One, body: Body) -> Reply<control::Store> {
    let name: Name = part(&name?)?;
    let request: control::StoreDrain = parse(body)?;
    let action = if request.cancel {
        "store.drain_cancel"
    } else {
        "store.drain"
    };
    let on = name.to_string();
    act(operations, by, action, on, |operations| async move {
        operations.store_drain(&name, request.cancel).await
    })
    .await
}

/// `?lost=true`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RemoveQuery {
    #[serde(default)]
    lost: bool,
}

async fn store_remove(
    State(operations): Ops,
    by: Caller,
    name: One,
    query: Result<Query<RemoveQuery>, QueryRejection>,
) -> Reply<Done> {
    let name: Name = part(&name?)?;
    let Query(RemoveQuery { lost }) = query?;
    let action = if lost { "store.remove_lost" } else { "store.remove" };
    let on = name.to_string();
    act(operations, by, action, on, |operations| async move {
        match lost {
            true => operations.store_remove_lost(&name).await,
            false => operations.store_remove(&name).await,
        }
        .map(|()| Done {})
    })
    .await
}

async fn customer_create(State(operations): Ops, by: Caller, body: Body) -> Reply<control::Customer> {
    let request: control::CustomerCreate = parse(body)?;
    let on = request.name.to_string();
    act(operations, by, "customer.create", on, |operations| async move {
        operations.customer_create(request).await
    })
    .await
}

async fn customer_list(State(operations): Ops) -> Reply<List<control::Customer>> {
    run(async move { list(operations.customer_list()) }).await
}

async fn customer_show(State(operations): Ops, name: One) -> Reply<control::Customer> {
    let name: Name = part(&name?)?;
    run(async move { operations.customer_show(&name) }).await
}

async fn vm_create(State(operations): Ops, by: Caller, body: Body) -> Reply<control::Vm> {
    let request: control::VmCreate = parse(body)?;
    let uid = by.0.uid();
    let on = request.name.to_string();
    act(operations, by, "vm.create", on, |operations| async move {
        operations.vm_create(request, uid)
    })
    .await
}

async fn vm_list(State(operations): Ops) -> Reply<List<control::Vm>> {
    run(async move { list(operations.vm_list()) }).await
}

async fn vm_show(State(operations): Ops, name: One) -> Reply<control::Vm> {
    let name: Name = part(&name?)?;
    run(async move { operations.vm_show(&name) }).await
}

async fn vm_remove(State(operations): Ops, by: Caller, name: One) -> Reply<Done> {
    let name: Name = part(&name?)?;
    let on = name.to_string();
    act(operations, by, "vm.remove", on, |operations| async move {
        operations.vm_remove(&name).map(|()| Done {})
    })
    .await
}

async fn volume_create(State(operations): Ops, by: Caller, body: Body) -> Reply<control::Volume> {
    let request: control::VolumeCreate = parse(body)?;
    let on = request.volume.to_string();
    act(operations, by, "volume.create", on, |operations| async move {
        operations.volume_create(request).await
    })
    .await
}

async fn volume_list(State(operations): Ops) -> Reply<List<control::Volume>> {
    run(async move { list(operations.volume_list().await) }).await
}

async fn volume_show(State(operations): Ops, path: Two) -> Reply<control::Volume> {
    let path = volume_path(path)?;
    run(async move { operations.volume_show(&path).await }).await
}

async fn volume_resize(State(operations): Ops, by: Caller, path: Two, body: Body) -> Reply<control::Volume> {
    let path = volume_path(path)?;
    let request: control::VolumeResize = parse(body)?;
    let on = path.to_string();
    act(operations, by, "volume.resize", on, |operations| async move {
        operations.volume_resize(&path, request).await
    })
    .await
}

/// `?now=true`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct DeleteQuery {
    #[serde(default)]
    now: bool,
}

async fn volume_delete(
    State(operations): Ops,
    by: Caller,
    path: Two,
    query: Result<Query<DeleteQuery>, QueryRejection>,
) -> Reply<control::Destroy> {
    let path = volume_path(path)?;
    let Query(DeleteQuery { now }) = query?;
    let on = path.to_string();
    act(operations, by, "volume.delete", on, |operations| async move {
        operations.volume_delete(&path, now).await
    })
    .await
}

async fn attach(State(operations): Ops, by: Caller, body: Body) -> Reply<control::Attachment> {
    let request: control::Attach = parse(body)?;
    let on = format!("{} to {}", request.volume, request.vm);
    act(operations, by, "volume.attach", on, |operations| async move {
        operations.attach(request).await
    })
    .await
}

async fn attachment_list(State(operations): Ops) -> Reply<List<control::Attachment>> {
    run(async move { list(operations.attachment_list().await) }).await
}

async fn detach(State(operations): Ops, by: Caller, body: Body) -> Reply<Done> {
    let request: control::Detach = parse(body)?;
    let on = format!("{} from {}", request.volume, request.vm);
    act(operations, by, "volume.detach", on, |operations| async move {
        operations.detach(request).await.map(|()| Done {})
    })
    .await
}

async fn scrub_start(State(operations): Ops, by: Caller, body: Body) -> Reply<List<control::Scrub>> {
    let request: control::ScrubStart = parse(body)?;
    let on = request
        .volume
        .as_ref()
        .map_or_else(|| "all".into(), ToString::to_string);
    act(operations, by, "scrub.start", on, |operations| async move {
        list(operations.scrub_start(&request))
    })
    .await
}

async fn scrub_status(State(operations): Ops) -> Reply<List<control::Scrub>> {
    run(async move { list(operations.scrub_status()) }).await
}

async fn destroy_list(State(operations): Ops) -> Reply<List<control::Destroy>> {
    run(async move { list(operations.destroy_list().await) }).await
}

async fn destroy_show(State(operations): Ops, id: One) -> Reply<control::Destroy> {
    let id: VolumeId = part(&id?)?;
    run(async move { operations.destroy_show(id).await }).await
}

/// `?after=SEQ&limit=N`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct AuditQuery {
    after: Option<u64>,
    limit: Option<usize>,
}

async fn audit_list(
    State(operations): Ops,
    query: Result<Query<AuditQuery>, QueryRejection>,
) -> Reply<List<control::AuditEntry>> {
    let Query(AuditQuery { after, limit }) = query?;
    run(async move { list(operations.audit_list(after, limit)) }).await
}

async fn audit_verify(State(operations): Ops) -> Reply<control::AuditVerified> {
    run(async move { operations.audit_verify() }).await
}
