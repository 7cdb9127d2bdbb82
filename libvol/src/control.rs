//! The API's request and response types, shared by `vold` and `volctl`. JSON over HTTP; field names are stable.
//!
//! | method and path | request | response |
//! |---|---|---|
//! | `GET /v1/version` | | [`Version`] |
//! | `GET /v1/status` | | [`Status`] |
//! | `POST /v1/stores` | [`StoreAdd`] | [`Store`] |
//! | `GET /v1/stores`, `GET /v1/stores/{name}` | | [`List`] of [`Store`], [`Store`] |
//! | `POST /v1/stores/{name}/reopen` | | [`Store`] |
//! | `POST /v1/stores/{name}/drain` | [`StoreDrain`] | [`Store`] |
//! | `DELETE /v1/stores/{name}`, `DELETE /v1/stores/{name}?lost=true` | | [`Done`] |
//! | `POST /v1/customers` | [`CustomerCreate`] | [`Customer`] |
//! | `GET /v1/customers`, `GET /v1/customers/{customer}` | | [`List`] of [`Customer`], [`Customer`] |
//! | `POST /v1/vms` | [`VmCreate`] | [`Vm`] |
//! | `GET /v1/vms`, `GET /v1/vms/{vm}` | | [`List`] of [`Vm`], [`Vm`] |
//! | `DELETE /v1/vms/{vm}` | | [`Done`] |
//! | `POST /v1/volumes` | [`VolumeCreate`] | [`Volume`] |
//! | `GET /v1/volumes`, `GET /v1/volumes/{customer}/{name}` | | [`List`] of [`Volume`], [`Volume`] |
//! | `POST /v1/volumes/{customer}/{name}/resize` | [`VolumeResize`] | [`Volume`] |
//! | `DELETE /v1/volumes/{customer}/{name}?now=true` | | [`Destroy`] |
//! | `POST /v1/attachments` | [`Attach`] | [`Attachment`] |
//! | `GET /v1/attachments` | | [`List`] of [`Attachment`] |
//! | `POST /v1/detach` | [`Detach`] | [`Done`] |
//! | `POST /v1/scrubs` | [`ScrubStart`] | [`List`] of [`Scrub`] |
//! | `GET /v1/scrubs` | | [`List`] of [`Scrub`] |
//! | `GET /v1/audit?after=SEQ&limit=N` | | [`List`] of [`AuditEntry`] |
//! | `GET /v1/audit/verify` | | [`AuditVerified`] |
//! | `GET /v1/destroys`, `GET /v1/destroys/{volume_id}` | | [`List`] of [`Destroy`], [`Destroy`] |
//!
//! Errors have a 4xx or 5xx status and the body [`ErrorBody`].

use serde::{Deserialize, Serialize};

use crate::error::Kind;
use crate::ids::{AttachmentId, CustomerId, Name, VmId, VolumeId, VolumePath};

/// Body of every refusal.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ErrorBody {
    /// The one member.
    pub error: ErrorDetail,
}

/// What went wrong.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ErrorDetail {
    /// Stable code, as [`Kind::code`].
    pub code: String,
    /// One line: what, why, what to do.
    pub message: String,
}

impl ErrorBody {
    /// From a kind and its line.
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self {
            error: ErrorDetail {
                code: kind.code().into(),
                message: message.into(),
            },
        }
    }
}

/// A list, so that fields can be added beside it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct List<T> {
    /// The items, sorted by name or time.
    pub items: Vec<T>,
}

/// Nothing more to say.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Done {}

/// `volctl version`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Version {
    /// The daemon's version.
    pub version: String,
    /// Store format versions it reads and writes.
    pub store_format: u32,
    /// I/O engine in use: `io_uring` or `threads`.
    pub io_engine: String,
}

/// `volctl status`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Status {
    /// The daemon's version.
    pub version: String,
    /// Seconds since start.
    pub uptime_seconds: u64,
    /// I/O engine in use.
    pub io_engine: String,
    /// Shards (data-plane threads).
    pub shards: usize,
    /// Stores by state.
    pub stores: Vec<Store>,
    /// How many there are.
    pub customers: usize,
    /// How many there are.
    pub vms: usize,
    /// How many there are.
    pub volumes: usize,
    /// How many there are.
    pub attachments: usize,
    /// Volumes being destroyed.
    pub destroying: usize,
    /// NBD connections that serve requests, and vhost-user front-ends.
    pub connections: usize,
    /// NBD connections in their handshake.
    pub handshakes: usize,
    /// Tasks of the data plane: its own, and those of connections and their requests.
    pub tasks: usize,
    /// Lines about anything that needs an operator; empty when all is well.
    pub warnings: Vec<String>,
}

/// `volctl store add`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StoreAdd {
    /// Its name.
    pub name: Name,
    /// Absolute path of the file to create, or of an existing block device.
    pub path: String,
    /// Size in bytes; needed for a file, at most the device's for a device (absent: all of it).
    pub size_bytes: Option<u64>,
    /// Failure domain; absent: a zone of its own, named after the store.
    pub zone: Option<Name>,
    /// Extent size in bytes; absent: 4 MiB.
    pub extent_bytes: Option<u64>,
    /// Accept a file system without O_DIRECT.
    #[serde(default)]
    pub allow_buffered: bool,
}

/// State of a store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StoreState {
    /// In use.
    Online,
    /// Not opened: missing, damaged or locked.
    Offline,
    /// A sync failed; out of use until an operator acts.
    Faulty,
    /// In use; its replicas move off.
    Draining,
    /// In use; nothing is on it any more, and what was is overwritten.
    Drained,
    /// Given up; its replicas are being replaced.
    Lost,
}

/// `volctl store drain`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StoreDrain {
    /// Leave what is there, and use the store as before.
    #[serde(default)]
    pub cancel: bool,
}

/// A store.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Store {
    /// Its name.
    pub name: Name,
    /// Its id.
    pub id: String,
    /// Where it is.
    pub path: String,
    /// Its failure domain.
    pub zone: Name,
    /// Its state.
    pub state: StoreState,
    /// Why it is not online.
    pub reason: Option<String>,
    /// Volumes that have a replica on it.
    pub replicas: usize,
    /// `in_place`, `not_in_place` or `unknown`.
    pub medium: String,
    /// What the medium's class rests on.
    pub medium_reason: String,
    /// Extent size.
    pub extent_bytes: u64,
    /// All data extents.
    pub total_bytes: u64,
    /// Free and verified zero.
    pub free_bytes: u64,
    /// Waiting to be overwritten and verified.
    pub pending_scrub_bytes: u64,
    /// Holding volumes' data.
    pub allocated_bytes: u64,
}

/// `volctl customer create`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CustomerCreate {
    /// Its name.
    pub name: Name,
}

/// A customer.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Customer {
    /// Its name.
    pub name: Name,
    /// Its id.
    pub id: CustomerId,
    /// Seconds since 1970.
    pub created_unix_seconds: u64,
    /// How many it has.
    pub vms: usize,
    /// How many it has.
    pub volumes: usize,
}

/// `volctl vm create`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmCreate {
    /// Its name, unique on the host.
    pub name: Name,
    /// Whose it is.
    pub customer: Name,
    /// Unix uid its QEMU runs as; absent: the caller's.
    pub uid: Option<u32>,
}

/// A VM.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Vm {
    /// Its name.
    pub name: Name,
    /// Its id.
    pub id: VmId,
    /// Whose it is.
    pub customer: Name,
    /// Unix uid its QEMU runs as.
    pub uid: u32,
    /// Volumes attached to it.
    pub volumes: Vec<VolumePath>,
}

/// `volctl volume create`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VolumeCreate {
    /// Its full name.
    pub volume: VolumePath,
    /// Size: a multiple of 4 KiB.
    pub size_bytes: u64,
    /// Replicas, each in a zone of its own; absent: 2 where there are two zones, else 1.
    pub replicas: Option<usize>,
}

/// `volctl volume resize`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VolumeResize {
    /// New size: a multiple of 4 KiB, not below the present one.
    pub size_bytes: u64,
}

/// State of a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VolumeState {
    /// Ready to be attached.
    Available,
    /// Attached to a VM.
    Attached,
    /// Stopped: a device failed, or a store is away.
    Failed,
    /// Being destroyed.
    Destroying,
}

/// One replica.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Replica {
    /// The store's name.
    pub store: Name,
    /// `in_sync`, `stale`, `resyncing` or `away`.
    pub state: String,
    /// Why it is not in sync.
    pub reason: Option<String>,
    /// Resyncing: bytes of extents still to be compared or copied.
    pub resync_left_bytes: Option<u64>,
    /// Resyncing: seconds until it is in sync, at the rate so far.
    pub resync_seconds_left: Option<u64>,
}

/// A volume.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Volume {
    /// Its id.
    pub id: VolumeId,
    /// Its name among its customer's.
    pub name: Name,
    /// Whose it is.
    pub customer: Name,
    /// Its size.
    pub size_bytes: u64,
    /// Its state.
    pub state: VolumeState,
    /// Why it has failed.
    pub reason: Option<String>,
    /// Attachment epoch: rises with every attach and detach.
    pub epoch: u64,
    /// Its replicas.
    pub replicas: Vec<Replica>,
    /// Bytes of extents it holds on one replica.
    pub allocated_bytes: u64,
    /// VM it is attached to.
    pub attached_to: Option<Name>,
    /// Blocks found damaged and repaired since the daemon started.
    pub healed_blocks: u64,
    /// Checksum areas found damaged on a replica and repaired since the daemon started.
    pub healed_areas: u64,
    /// Blocks accepted after a crash without a matching checksum.
    pub unverified_blocks: u64,
    /// Extents still to be reconciled after a crash.
    pub recovering_extents: u64,
    /// Seconds since 1970.
    pub created_unix_seconds: u64,
}

/// Data protocol of an attachment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Protocol {
    /// NBD over a Unix socket.
    #[default]
    Nbd,
    /// vhost-user-blk.
    VhostUser,
}

/// `volctl attach`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Attach {
    /// Which volume.
    pub volume: VolumePath,
    /// To which VM.
    pub vm: Name,
    /// How.
    #[serde(default)]
    pub via: Protocol,
    /// Refuse writes.
    #[serde(default)]
    pub read_only: bool,
    /// For the QEMU that the running VM migrates to: a second attachment, that takes over when its device starts.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub incoming: bool,
}

/// `volctl detach`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Detach {
    /// Which volume.
    pub volume: VolumePath,
    /// From which VM.
    pub vm: Name,
    /// Only the attachment that was to take over: the VM stays where it is.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub incoming: bool,
}

/// An attachment.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Attachment {
    /// Its id.
    pub attachment_id: AttachmentId,
    /// The volume.
    pub volume: VolumePath,
    /// The VM.
    pub vm: Name,
    /// Attachment epoch.
    pub epoch: u64,
    /// The protocol.
    pub protocol: Protocol,
    /// Whether writes are refused.
    pub read_only: bool,
    /// NBD: `nbd+unix:///EXPORT?socket=PATH`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub uri: Option<String>,
    /// The socket's path.
    pub socket: String,
    /// Arguments that give it to QEMU.
    pub qemu_args: Vec<String>,
    /// vhost-user: arguments that QEMU needs besides, once a machine: memory that others can map. `SIZE` in them stands for the
    /// machine's memory, as `-m` has it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub qemu_memory_args: Vec<String>,
    /// NBD: the same over TLS, where the daemon listens.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub over_tls: Vec<TlsAccess>,
    /// Live connections.
    pub connections: usize,
    /// It takes over from the VM's other attachment of the volume when its device starts.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub incoming: bool,
}

/// An attachment as the VM reaches it over TLS, with its certificate.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct TlsAccess {
    /// `nbds://HOST:PORT/EXPORT`.
    pub uri: String,
    /// Arguments that give it to QEMU, for certificates in `/etc/pki/qemu`.
    pub qemu_args: Vec<String>,
}

/// Where a destruction stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DestroyState {
    /// At work, or waiting for a store to return.
    Destroying,
    /// Every replica is overwritten, verified and free.
    Destroyed,
}

/// Where a destruction stands on one store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DestroyStep {
    /// Not begun.
    Waiting,
    /// The store is away; the job goes on when it returns.
    Away,
    /// Overwriting the wrapped keys.
    Keys,
    /// Overwriting and reading back extents.
    Scrubbing,
    /// All overwritten, verified and free.
    Done,
    /// The store was given up as lost; nothing is known of what it holds.
    Lost,
}

/// Progress on one store.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct DestroyStore {
    /// The store's name.
    pub store: Name,
    /// Its step.
    pub state: DestroyStep,
    /// Extents the volume held there.
    pub extents: u64,
    /// Bytes overwritten and verified.
    pub bytes_done: u64,
    /// Bytes to overwrite and verify: data and checksum areas.
    pub bytes_total: u64,
}

/// A destruction.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Destroy {
    /// The volume's id.
    pub volume_id: VolumeId,
    /// Its name when it was deleted.
    pub volume: VolumePath,
    /// Where it stands.
    pub state: DestroyState,
    /// By store.
    pub stores: Vec<DestroyStore>,
    /// Seconds since 1970.
    pub started_unix_seconds: u64,
    /// Seconds since 1970.
    pub finished_unix_seconds: Option<u64>,
}

/// How what was asked for ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AuditOutcome {
    /// It was done.
    Done,
    /// It was refused, or failed.
    Refused,
}

/// A line of the audit log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AuditEntry {
    /// Its number, from 1 without a gap.
    pub seq: u64,
    /// Seconds since 1970.
    pub unix_seconds: u64,
    /// Who: `uid 0`, or `vold`.
    pub actor: String,
    /// What, as `NOUN.VERB`.
    pub action: String,
    /// To what.
    pub subject: String,
    /// How it ended.
    pub outcome: AuditOutcome,
    /// What else there is to say; why it was refused.
    pub detail: String,
    /// SHA-256 of the line before, in hexadecimal; zeros before the first.
    pub previous: String,
}

/// What a verification of the audit log has found: an unbroken chain.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuditVerified {
    /// Lines.
    pub entries: u64,
    /// Number of the first one that is there.
    pub first: u64,
    /// Number of the last one.
    pub last: u64,
    /// SHA-256 of the last line, in hexadecimal. Kept elsewhere, it vouches for all lines before.
    pub head: String,
}

/// `volctl scrub start`: verify now what is stored.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ScrubStart {
    /// Which volume; absent: all.
    #[serde(default)]
    pub volume: Option<VolumePath>,
    /// Bytes to verify a second at most; absent: as fast as clients leave room for.
    #[serde(default)]
    pub bytes_per_second: Option<u64>,
}

/// What the integrity scrub does with a volume now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ScrubState {
    /// Nothing; the next pass comes when it is due.
    Idle,
    /// It is its turn.
    Running,
    /// A pass waits for its turn, or to go on.
    Queued,
}

/// The integrity scrub of a volume: the pass under way or waiting, else the last one that reached the end.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Scrub {
    /// Which volume.
    pub volume: VolumePath,
    /// What is done with it now.
    pub state: ScrubState,
    /// Why a pass does not go on.
    pub reason: Option<String>,
    /// Number of this pass, from 1; 0: there was none yet.
    pub pass: u64,
    /// Bytes of this pass done, on all replicas together.
    pub bytes_done: u64,
    /// Bytes this pass has to do, on all replicas together; 0 before its first turn.
    pub bytes_total: u64,
    /// Limit of a pass under way or waiting, in bytes a second; absent: none.
    pub bytes_per_second: Option<u64>,
    /// When this pass was asked for or begun, in seconds since 1970.
    pub started_unix_seconds: Option<u64>,
    /// When the last pass reached the end, in seconds since 1970.
    pub last_finished_unix_seconds: Option<u64>,
    /// Bytes read and verified in this pass.
    pub verified_bytes: u64,
    /// Damaged copies of blocks that this pass rewrote from a good one.
    pub healed_blocks: u64,
    /// Extents whose damaged checksum area this pass had written anew.
    pub healed_areas: u64,
    /// Blocks that this pass found no good copy of.
    pub lost_blocks: u64,
}
