//! Volume slots: the immutable facts of a volume and its wrapped data keys, 4 KiB, two copies, written in place.
//!
//! Wrapped keys live only here, so that overwriting the copies really removes them. A slot whose table record is not a
//! live volume holds zeros; what else is found there is overwritten when the store is opened, and never read as a slot.

use std::rc::Rc;

use super::VolumeSlot;
use super::handle::Shared;
use super::layout::SLOT_BYTES;
use super::wire::{crc32c, is_zero, structure};
use crate::buf::Buf;
use crate::disk::Disk;
use crate::error::{Error, Result};
use crate::ids::{CmkId, CustomerId, DatasetId, KeyVersion, StoreId, VolumeId};
use crate::keys::{WRAPPED_BYTES_MAX, WrappedKey};
use crate::sabotage::{Rule, broken};

structure! {
    /// One slot copy.
    fields, 4096,
    MAGIC "magic" 0 8,
    STORE "store id" 8 16,
    SLOT "slot number" 24 4,
    STORE_COUNT "store count" 28 2,
    KEY_COUNT "key count" 30 2,
    SEQUENCE "sequence" 32 8,
    VOLUME "volume id" 40 16,
    CUSTOMER "customer id" 56 16,
    DATASET "dataset id" 72 16,
    CUSTOMER_NAME "customer name" 88 64,
    VOLUME_NAME "volume name" 152 64,
    STORES "stores" 216 96,
    RESERVED_1 "reserved" 312 200,
    KEYS "keys" 512 3264,
    RESERVED_2 "reserved" 3776 316,
    CRC "crc" 4092 4,
}

structure! {
    /// One key of a slot.
    key_fields, 544,
    VERSION "key version" 0 4,
    LEN "length" 4 2,
    RESERVED_1 "reserved" 6 2,
    CMK "cmk id" 8 16,
    RESERVED_2 "reserved" 24 8,
    BYTES "wrapped key" 32 512,
}

/// First bytes of every slot in use.
pub(super) const MAGIC: [u8; 8] = *b"VOLDSLOT";
/// Stores a slot has room for.
const STORES_MAX: usize = fields::STORES.len / 16;
/// Key versions a slot has room for.
const KEYS_MAX: usize = fields::KEYS.len / key_fields::SIZE;
const _: () = assert!(key_fields::BYTES.len == WRAPPED_BYTES_MAX && fields::SIZE == SLOT_BYTES as usize);

/// What one slot copy turned out to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum SlotCopy {
    Valid(u64, VolumeSlot),
    Zero,
    Damaged(&'static str),
}

/// Refuses what a slot has no room for.
///
/// # Errors
/// `Invalid`.
pub(super) fn check_fits(slot: &VolumeSlot) -> Result<()> {
    let fits = slot.stores.len() <= STORES_MAX
        && slot.keys.len() <= KEYS_MAX
        && slot
            .keys
            .iter()
            .all(|(_, key)| key.bytes.len() <= WRAPPED_BYTES_MAX);
    if fits {
        return Ok(());
    }
    Err(Error::invalid(format!(
        "volume {}: a slot holds at most {STORES_MAX} stores, {KEYS_MAX} keys and {WRAPPED_BYTES_MAX} bytes a key",
        slot.volume
    )))
}

fn encode(store: StoreId, number: u32, sequence: u64, slot: &VolumeSlot) -> Buf {
    use fields as f;
    let mut bytes = Buf::zeroed(f::SIZE);
    let out = &mut bytes[..];
    f::MAGIC.put(out, &MAGIC);
    f::STORE.put(out, store.as_bytes());
    f::SLOT.put_u32(out, number);
    f::STORE_COUNT.put_u16(out, slot.stores.len() as u16);
    f::KEY_COUNT.put_u16(out, slot.keys.len() as u16);
    f::SEQUENCE.put_u64(out, sequence);
    f::VOLUME.put(out, slot.volume.as_bytes());
    f::CUSTOMER.put(out, slot.customer.as_bytes());
    f::DATASET.put(out, slot.dataset.as_bytes());
    f::CUSTOMER_NAME.put_name(out, &slot.customer_name);
    f::VOLUME_NAME.put_name(out, &slot.volume_name);
    for (room, id) in out[f::STORES.at..].chunks_exact_mut(16).zip(&slot.stores) {
        room.copy_from_slice(id.as_bytes());
    }
    for (room, (version, key)) in out[f::KEYS.at..]
        .chunks_exact_mut(key_fields::SIZE)
        .zip(&slot.keys)
    {
        key_fields::VERSION.put_u32(room, version.0);
        key_fields::LEN.put_u16(room, key.bytes.len() as u16);
        key_fields::CMK.put(room, key.cmk.as_bytes());
        room[key_fields::BYTES.at..][..key.bytes.len()].copy_from_slice(&key.bytes);
    }
    let crc = crc32c(&out[..f::CRC.at]);
    f::CRC.put_u32(out, crc);
    bytes
}

/// Reads one copy; `store` and `number` are where it was found.
pub(super) fn decode(store: StoreId, number: u32, bytes: &[u8]) -> SlotCopy {
    use fields as f;
    if is_zero(bytes) {
        return SlotCopy::Zero;
    }
    if f::MAGIC.of(bytes) != MAGIC {
        return SlotCopy::Damaged("not a slot");
    }
    if crc32c(&bytes[..f::CRC.at]) != f::CRC.u32(bytes) {
        return SlotCopy::Damaged("wrong checksum");
    }
    if f::STORE.of(bytes) != store.as_bytes() || f::SLOT.u32(bytes) != number {
        return SlotCopy::Damaged("of another place");
    }
    match decode_slot(bytes) {
        Some(slot) => SlotCopy::Valid(f::SEQUENCE.u64(bytes), slot),
        None => SlotCopy::Damaged("impossible contents"),
    }
}

fn decode_slot(bytes: &[u8]) -> Option<VolumeSlot> {
    use fields as f;
    let (stores, keys) = (f::STORE_COUNT.u16(bytes), f::KEY_COUNT.u16(bytes));
    if usize::from(stores) > STORES_MAX || usize::from(keys) > KEYS_MAX {
        return None;
    }
    let id = |chunk: &[u8]| <[u8; 16]>::try_from(chunk).expect("16 bytes");
    let stores = f::STORES.of(bytes).chunks_exact(16).take(stores.into());
    let keys = f::KEYS.of(bytes).chunks_exact(key_fields::SIZE).take(keys.into());
    let key = |room: &[u8]| {
        let key = WrappedKey {
            cmk: CmkId::from_bytes(key_fields::CMK.id(room)),
            bytes: key_fields::BYTES
                .of(room)
                .get(..key_fields::LEN.u16(room).into())?
                .to_vec(),
        };
        Some((KeyVersion(key_fields::VERSION.u32(room)), key))
    };
    Some(VolumeSlot {
        volume: VolumeId::from_bytes(f::VOLUME.id(bytes)),
        customer: CustomerId::from_bytes(f::CUSTOMER.id(bytes)),
        customer_name: f::CUSTOMER_NAME.name(bytes)?,
        volume_name: f::VOLUME_NAME.name(bytes)?,
        dataset: DatasetId::from_bytes(f::DATASET.id(bytes)),
        stores: stores.map(|chunk| StoreId::from_bytes(id(chunk))).collect(),
        keys: keys.map(key).collect::<Option<_>>()?,
    })
}

/// Writes copy 1, syncs, reads it back, then copy 2 likewise: at any moment one copy is whole.
///
/// # Errors
/// `Io`, also when a copy does not read back as written. The store is latched only if the sync failed.
pub(super) async fn write(
    shared: &Shared,
    disk: &Disk,
    number: u32,
    sequence: u64,
    slot: &VolumeSlot,
) -> Result<()> {
    for copy in [0, 1] {
        write_copy(shared, disk, number, copy, sequence, slot).await?;
    }
    Ok(())
}

/// Writes a slot that is there anew, with the next sequence. A copy that is bad or older is written first, so that the good one
/// is not risked while it is the only one.
///
/// # Errors
/// As [`write()`]; `Damaged` when neither copy is a slot.
pub(super) async fn rewrite(shared: &Shared, disk: &Disk, number: u32, slot: &VolumeSlot) -> Result<()> {
    let mut sequences = [None; 2];
    for (copy, sequence) in sequences.iter_mut().enumerate() {
        let at = shared.layout.slot_at(number, copy as u8);
        let (read, bytes) = disk.read(at, Buf::zeroed(fields::SIZE), 0..fields::SIZE).await;
        // What cannot be read counts as bad.
        if read.is_ok()
            && let SlotCopy::Valid(found, _) = decode(shared.info.id, number, &bytes)
        {
            *sequence = Some(found);
        }
    }
    let Some(greatest) = sequences.into_iter().flatten().max() else {
        return Err(Error::damaged(format!(
            "volume slot {number}: both copies are bad"
        )));
    };
    let order = if sequences[0] <= sequences[1] {
        [0, 1]
    } else {
        [1, 0]
    };
    for copy in order {
        write_copy(shared, disk, number, copy, greatest + 1, slot).await?;
    }
    Ok(())
}

/// Writes one copy, syncs and reads it back.
///
/// # Errors
/// As [`write()`].
pub(super) async fn write_copy(
    shared: &Shared,
    disk: &Disk,
    number: u32,
    copy: u8,
    sequence: u64,
    slot: &VolumeSlot,
) -> Result<()> {
    let bytes = Rc::new(encode(shared.info.id, number, sequence, slot));
    overwrite(shared, disk, number, copy, bytes).await
}

/// Overwrites both copies with zeros, each synced and read back. One that cannot be does not spare the other.
///
/// # Errors
/// As [`write()`].
pub(super) async fn erase(shared: &Shared, disk: &Disk, number: u32) -> Result<()> {
    let zeros = Rc::new(Buf::zeroed(fields::SIZE));
    let first = overwrite(shared, disk, number, 0, zeros.clone()).await;
    if broken(Rule::KeyCopies) {
        return first;
    }
    let second = overwrite(shared, disk, number, 1, zeros).await;
    first.and(second)
}

async fn overwrite(shared: &Shared, disk: &Disk, number: u32, copy: u8, bytes: Rc<Buf>) -> Result<()> {
    let name = format!("volume slot {number}, copy {}", copy + 1);
    let at = shared.layout.slot_at(number, copy);
    let written = disk.write(at, bytes.clone(), 0..bytes.len()).await;
    written.map_err(|e| Error::from(e).context(&name))?;
    shared.sync(disk, &name).await?;
    let (read, back) = disk.read(at, Buf::zeroed(bytes.len()), 0..bytes.len()).await;
    read.map_err(|e| Error::from(e).context(&name))?;
    if back[..] != bytes[..] {
        return Err(Error::io(format!(
            "{name}: reads back other bytes than were written"
        )));
    }
    Ok(())
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in crate::store) fn example(volume: VolumeId) -> VolumeSlot {
        VolumeSlot {
            volume,
            customer: CustomerId::random(),
            customer_name: "acme".parse().unwrap(),
            volume_name: "web".parse().unwrap(),
            dataset: DatasetId::random(),
            stores: vec![StoreId::random(), StoreId::random()],
            keys: vec![(
                KeyVersion(1),
                WrappedKey {
                    cmk: CmkId::random(),
                    bytes: (0..92).collect(),
                },
            )],
        }
    }

    #[test]
    fn a_slot_is_read_as_written_and_only_where_it_was_written() {
        let (store, slot) = (StoreId::random(), example(VolumeId::random()));
        let bytes = encode(store, 5, 9, &slot);
        assert_eq!(decode(store, 5, &bytes), SlotCopy::Valid(9, slot));
        assert_eq!(decode(store, 6, &bytes), SlotCopy::Damaged("of another place"));
        assert_eq!(
            decode(StoreId::random(), 5, &bytes),
            SlotCopy::Damaged("of another place")
        );
        assert_eq!(decode(store, 5, &[0; 4096]), SlotCopy::Zero);
    }

    #[test]
    fn any_flipped_bit_of_a_slot_is_noticed() {
        let store = StoreId::random();
        let mut bytes = encode(store, 5, 9, &example(VolumeId::random()));
        for at in (0..4096).step_by(7) {
            bytes[at] ^= 1;
            assert!(
                matches!(decode(store, 5, &bytes), SlotCopy::Damaged(_)),
                "byte {at}"
            );
            bytes[at] ^= 1;
        }
    }

    #[test]
    fn more_keys_than_a_slot_has_room_for_are_refused() {
        let mut slot = example(VolumeId::random());
        slot.keys = vec![slot.keys[0].clone(); KEYS_MAX];
        assert!(check_fits(&slot).is_ok());
        slot.keys.push(slot.keys[0].clone());
        assert!(check_fits(&slot).is_err());
    }
}
