//! Every limit of the product, with its arithmetic. Full means back-pressure or a clear refusal, never growth (I10).

/// Checksum, range-lock and cipher unit: 4 KiB.
pub const BLOCK_SIZE: usize = 4096;
/// [`BLOCK_SIZE`] as `u64`, for offsets.
pub const BLOCK: u64 = BLOCK_SIZE as u64;
/// The unit a disk writes atomically, and the unit of the XTS tweak: 512 bytes.
pub const SECTOR_SIZE: usize = 512;

/// How long a data-plane thread looks for completions before it sleeps, while several transfers are in flight and where it
/// pays: about the time an NVMe disk takes for a 4 KiB transfer under load.
pub const BUSY_POLL_DEFAULT: std::time::Duration = std::time::Duration::from_micros(200);
/// Longest of it that can be set: what is slower than this is not waited for awake.
pub const BUSY_POLL_MAX: std::time::Duration = std::time::Duration::from_millis(1);

/// Smallest volume: one block.
pub const VOLUME_BYTES_MIN: u64 = BLOCK;
/// Largest volume: 64 TiB. 2^46 bytes are 2^34 blocks, far below IEEE 1619-2025's 2^44 blocks a key.
pub const VOLUME_BYTES_MAX: u64 = 64 << 40;
/// Replicas of one volume, each in a zone of its own.
pub const REPLICAS_MAX: usize = 3;

/// Places for replicas that a volume has: one more than replicas, for the time one moves to another store.
pub const VOLUME_PLACES_MAX: usize = REPLICAS_MAX + 1;
/// Bytes a second that a replica which catches up is written with, unless the operator says otherwise: a quarter of what an
/// ordinary NVMe disk writes, so that clients keep most of it.
pub const RESYNC_BYTES_PER_SECOND_DEFAULT: u64 = 256 << 20;

/// Default extent: 4 MiB, so a checksum area is 4 KiB of sums and one header sector, rounded up to 8 KiB (0.2 %).
pub const EXTENT_BYTES_DEFAULT: u64 = 4 << 20;
/// Smallest extent a store can be created with.
pub const EXTENT_BYTES_MIN: u64 = 1 << 20;
/// Largest extent a store can be created with.
pub const EXTENT_BYTES_MAX: u64 = 64 << 20;
/// Smallest store: its metadata and a handful of extents.
pub const STORE_BYTES_MIN: u64 = 64 << 20;
/// Largest store: 2^32 extents of 4 MiB are 16 PiB; the table lives in memory, so stop at 64 TiB (16 Mi extents).
pub const STORE_BYTES_MAX: u64 = 64 << 40;
/// How long an earlier process may take to let a store go. The kernel closes a killed process's files after its last
/// transfer, in one queue with everybody's late closes; there a deleted file whose blocks the disk discards slowly can hold
/// them up for tens of seconds.
pub const STORE_LOCK_WAIT: std::time::Duration = std::time::Duration::from_secs(30);
/// Opening a store is given up after this: its table and log, read at 50 MB/s, are those of 60 TiB by then.
pub const STORE_OPENING_MAX: std::time::Duration = std::time::Duration::from_secs(120);
/// A store that has not done what the control plane asked of it by then is taken to hang.
pub const STORE_ANSWER_MAX: std::time::Duration = std::time::Duration::from_secs(30);
/// The end of a store is not waited for any longer; what is under way keeps its lock.
pub const STORE_CLOSING_MAX: std::time::Duration = std::time::Duration::from_secs(30);
/// Stores of one daemon.
pub const STORES_MAX: usize = 256;

/// Write-intent marks a store may hold; the cleaner gates writers of new extents beyond it.
pub const DIRTY_MARKS_PER_STORE: usize = 8192;
/// How often what a store has committed is noted in the catalog. A store that is rolled back by less goes unnoticed.
pub const LINEAGE_FLOOR_SECONDS: u64 = 10;

/// Longest payload of one NBD request: 32 MiB, as the protocol recommends.
pub const NBD_PAYLOAD_MAX: u32 = 32 << 20;
/// Longest option a client may send in the handshake: a 4 KiB name and its framing, or a list of contexts.
pub const NBD_OPTION_BYTES_MAX: u32 = 16 << 10;
/// Options one handshake may hold.
pub const NBD_OPTIONS_MAX: u32 = 64;
/// Requests in flight on one connection.
pub const NBD_REQUESTS_IN_FLIGHT: usize = 256;
/// Payload bytes in flight on one connection: two of the largest requests.
pub const NBD_BYTES_IN_FLIGHT: usize = 64 << 20;
/// A payload that has begun holds its bytes, so it must go on: a client that sends nothing of it for so long is dropped.
pub const NBD_PAYLOAD_SECONDS: u64 = 60;
/// Connections of one attachment.
pub const NBD_CONNECTIONS_PER_ATTACHMENT: usize = 16;
/// Connections over TCP that have not said who they are yet: buffers of 32 KiB before TLS, of 96 KiB and rustls's own 64 KiB
/// under it, so 40 MiB at the most.
pub const NBD_STRANGERS_MAX: usize = 256;
/// Of these, from one IPv4 address or one IPv6 network of 64 bits: a quarter, so that one host (or whoever is on it) leaves
/// room for others, and more connections than a host's VMs begin at once.
pub const NBD_STRANGERS_PER_ADDRESS: usize = 64;
/// Connections over TCP of one customer's VMs.
pub const NBD_CONNECTIONS_PER_CUSTOMER: usize = 512;
/// Connections over TCP in all, those of strangers included.
pub const NBD_CONNECTIONS_MAX: usize = 4096;
/// A client that has not finished its handshake by then is dropped.
pub const NBD_HANDSHAKE_SECONDS: u64 = 10;

/// Data of a vhost-user request that is read or written at a time: 32 MiB, as over NBD. What is announced (SEG_MAX, SIZE_MAX)
/// keeps guests below it; not all keep to that (EDK2), and what they ask beyond is done in pieces.
pub const VHOST_PIECE_BYTES_MAX: u64 = 32 << 20;
/// Entries of one virtqueue, and of one indirect table.
pub const VHOST_QUEUE_SIZE_MAX: u16 = 1024;
/// Requests in flight of one vhost-user front-end, over all its queues: a queue of the largest size. The largest chain is
/// remembered in 32 KiB (2,047 parts), so 32 MiB.
pub const VHOST_REQUESTS_IN_FLIGHT: usize = VHOST_QUEUE_SIZE_MAX as usize;
/// Virtqueues of one device.
pub const VHOST_QUEUES_MAX: u16 = 128;
/// Memory regions of one guest: its memory below and above the hole, and what is plugged later.
pub const VHOST_REGIONS_MAX: usize = 64;
/// Memory of one guest: 2 TiB.
pub const VHOST_MEMORY_BYTES_MAX: u64 = 2 << 40;
/// A log of written pages: a bit for 4 KiB, so 128 MiB are guest addresses up to 4 TiB, holes included.
pub const VHOST_LOG_BYTES_MAX: u64 = 128 << 20;
/// What one attachment has mapped at a time: two full tables, logs, inflight areas and their notes, since what went may be in
/// use, or not unmapped yet, when its successor comes; rounded up to pages.
pub const VHOST_ATTACHMENT_MAPPINGS_MAX: u64 = 2 * (VHOST_REGIONS_MAX as u64 + 3);
/// See [`VHOST_ATTACHMENT_MAPPINGS_MAX`].
pub const VHOST_ATTACHMENT_MAPPED_BYTES_MAX: u64 = 2 * (VHOST_MEMORY_BYTES_MAX + (1 << 30));
/// Mappings of all front-ends' memory in one process. One of which pages have gone is three for Linux, which allows a process
/// 65,530 by itself (vm.max_map_count).
pub const VHOST_MAPPINGS_MAX: usize = 16_384;
/// Addresses of them: half of the 128 TiB that a process has.
pub const VHOST_MAPPED_BYTES_MAX: u64 = 64 << 40;

/// Body of one API request.
pub const API_BODY_BYTES_MAX: usize = 64 << 10;
/// Customers, VMs per customer, volumes per customer, attachments per VM.
pub const CUSTOMERS_MAX: usize = 10_000;
/// VMs of one customer.
pub const VMS_PER_CUSTOMER: usize = 10_000;
/// Volumes of one customer.
pub const VOLUMES_PER_CUSTOMER: usize = 10_000;
/// Attachments of one VM.
pub const ATTACHMENTS_PER_VM: usize = 64;

/// CMKs of one local keystore: 16,384 slots of 8 KiB are 128 MiB; above [`CUSTOMERS_MAX`], which have one each.
pub const KEYSTORE_CMKS_MAX: u32 = 16_384;

/// Request bytes in flight on one volume, over all its connections: two connections' worth. Counted from before a payload
/// is received until its reply has been sent. A connection that holds none may bring one request all the same, so that a
/// client that does not read its replies on one connection is served on the others. The most that one attachment can make
/// the daemon hold: two connections that fill it, and a largest request on each of the 14 others, 128 + 14 × 32 = 576 MiB.
pub const VOLUME_BYTES_IN_FLIGHT: usize = 2 * NBD_BYTES_IN_FLIGHT;
/// Idle request memory that one volume keeps: 32 requests of 1 MiB.
pub const VOLUME_POOL_BYTES_IDLE: usize = 32 << 20;
/// Block sums that one volume keeps in memory: 4 bytes a block are 4 KiB an extent of 4 MiB, so 16,384 extents or 64 GiB of
/// data. Half of it may be taken by dirty extents: 8,192 of 4 MiB, as many as a store may mark.
pub const VOLUME_SUM_CACHE_BYTES: usize = 64 << 20;
/// Extents that the cleaner takes with one flush, and that one metadata transaction of a volume names, at most.
pub const VOLUME_EXTENTS_PER_COMMIT: usize = 64;
/// Extents marked and allocated ahead of a sequential writer, at most: 32 MiB of the default size.
pub const VOLUME_EXTENTS_AHEAD: u32 = 8;
/// Extents of one volume that are reconciled at a time after a crash.
pub const VOLUME_RECOVERY_EXTENTS: usize = 4;
/// Extents of one volume that a replica catches up with at a time; each is read, compared and written whole, so 8 MiB.
pub const VOLUME_RESYNC_EXTENTS: usize = 2;
/// A request to a replica that has not ended by then counts as failed.
pub const REPLICA_DEADLINE_SECONDS: u64 = 30;
/// Blocks without a good copy that one volume remembers for its counter.
pub const VOLUME_LOST_BLOCKS_MAX: usize = 65_536;

/// Bytes after which the audit log begins another file.
pub const AUDIT_FILE_BYTES: u64 = 16 << 20;
/// Bytes of each text of an audit entry; more is cut off.
pub const AUDIT_TEXT_BYTES_MAX: usize = 1024;
/// Entries of the audit log in one answer.
pub const AUDIT_LIST_MAX: usize = 1000;
