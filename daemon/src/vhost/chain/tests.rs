//! Chains that a hostile guest can make: each is followed to its end or refused.

use super::*;
use crate::vhost::guest::{self, DATA, Guest, QUEUE};

const SIZE: u16 = 16;
const TABLE: u64 = QUEUE.desc;
const INDIRECT_TABLE: u64 = 0x2_0000;

fn walk(guest: &Guest) -> Result<Chain, Fault> {
    Chain::walk(&guest.memory, TABLE, SIZE, 0)
}

fn refused(guest: &Guest) -> String {
    walk(guest).expect_err("followed").to_string()
}

fn outside(guest: &Guest) -> bool {
    matches!(walk(guest), Err(Fault::Outside { .. }))
}

#[test]
fn a_chain_gives_its_parts_in_order() {
    let guest = Guest::simple();
    guest.put(DATA, b"abcdefgh");
    guest.chain(
        TABLE,
        0,
        &[
            (DATA, 3, false),
            (DATA + 4, 2, false),
            (DATA + 100, 1, true),
            (DATA + 200, 5, true),
        ],
    );
    let chain = walk(&guest).unwrap();
    assert_eq!((chain.readable_bytes(), chain.writable_bytes()), (5, 6));
    let mut out = [0; 4];
    chain.read(&guest.memory, 1, &mut out).unwrap();
    assert_eq!(&out, b"bcef");
    chain.write(&guest.memory, None, 0, b"123").unwrap();
    assert_eq!(guest.get(DATA + 100, 1), b"1");
    assert_eq!(guest.get(DATA + 200, 3), b"23\0");
    assert_eq!(chain.last_writable(), Some(DATA + 204));
    assert!(chain.read(&guest.memory, 2, &mut out).is_err());
    assert!(chain.write(&guest.memory, None, 4, b"123").is_err());
    chain.write(&guest.memory, None, 6, b"").unwrap();
}

#[test]
fn a_chain_that_loops_is_refused() {
    let guest = Guest::simple();
    let loops = "a chain longer than its table: it loops";
    guest.descriptor(TABLE, 0, (DATA, 1), guest::NEXT, 0);
    assert_eq!(refused(&guest), loops);
    guest.descriptor(TABLE, 0, (DATA, 1), guest::NEXT, 7);
    guest.descriptor(TABLE, 7, (DATA, 1), guest::NEXT, 0);
    assert_eq!(refused(&guest), loops);
    // Of no bytes, so that no limit of bytes ends it.
    for i in 0..SIZE {
        guest.descriptor(TABLE, i, (DATA, 0), guest::NEXT, (i + 1) % SIZE);
    }
    assert_eq!(refused(&guest), loops);
    // As long as the table is not too long.
    guest.descriptor(TABLE, SIZE - 1, (DATA, 1), 0, 0);
    assert_eq!(walk(&guest).unwrap().readable_bytes(), 1);
    // In an indirect table.
    guest.descriptor(TABLE, 0, (INDIRECT_TABLE, 32), guest::INDIRECT, 0);
    guest.descriptor(INDIRECT_TABLE, 0, (DATA, 1), guest::NEXT, 1);
    guest.descriptor(INDIRECT_TABLE, 1, (DATA, 1), guest::NEXT, 0);
    assert_eq!(refused(&guest), loops);
}

#[test]
fn a_link_outside_its_table_is_refused() {
    let guest = Guest::simple();
    for next in [SIZE, u16::MAX] {
        guest.descriptor(TABLE, 0, (DATA, 1), guest::NEXT, next);
        assert_eq!(refused(&guest), "a descriptor outside its table");
    }
    assert!(Chain::walk(&guest.memory, TABLE, SIZE, SIZE).is_err());
    // Without the flag it is no link.
    guest.descriptor(TABLE, 0, (DATA, 1), 0, u16::MAX);
    walk(&guest).unwrap();
    guest.descriptor(TABLE, 0, (INDIRECT_TABLE, 32), guest::INDIRECT, 0);
    guest.descriptor(INDIRECT_TABLE, 0, (DATA, 1), guest::NEXT, 2);
    assert_eq!(refused(&guest), "a descriptor outside its table");
}

#[test]
fn a_part_outside_the_memory_or_over_its_holes_is_refused() {
    let guest = Guest::new(&[(0, 0x2000), (0x2000, 0x1000), (0x5000, 0x1000)]);
    for (at, len) in [
        (0x3000, 1),
        (0x2fff, 2),
        (0x2fff, 0x2002),
        (0x5fff, 2),
        (u64::MAX, 1),
        (u64::MAX - 0xffe, 0xfff),
        (u64::MAX, u32::MAX),
        (0, u32::MAX),
        (0x5000, u32::MAX),
    ] {
        for flags in [0, guest::WRITE] {
            guest.descriptor(TABLE, 0, (at, len), flags, 0);
            assert!(outside(&guest), "{len} at {at:#x}");
        }
    }
    // Over the border of regions side by side.
    guest.descriptor(TABLE, 0, (0x1fff, 0x1001), 0, 0);
    assert_eq!(walk(&guest).unwrap().readable_bytes(), 0x1001);
}

#[test]
fn parts_of_no_bytes_are_no_parts() {
    let guest = Guest::simple();
    guest.chain(
        TABLE,
        0,
        &[
            (DATA, 0, false),
            (u64::MAX, 0, false),
            (DATA, 4, false),
            (DATA, 1, true),
            (DATA, 0, true),
        ],
    );
    let chain = walk(&guest).unwrap();
    assert_eq!((chain.readable_bytes(), chain.writable_bytes()), (4, 1));
    assert_eq!(chain.last_writable(), Some(DATA));
    guest.chain(TABLE, 0, &[(DATA, 0, false), (DATA, 0, true)]);
    assert_eq!(walk(&guest).unwrap().last_writable(), None);
}

#[test]
fn sums_of_lengths_do_not_wrap() {
    // One region of 4 GiB, sparse, and the longest chain: the sum is beyond 32 bits many times.
    let guest = Guest::new(&[(0, 4 << 30)]);
    let parts = vec![(0, u32::MAX, true); 1024];
    guest.chain(INDIRECT_TABLE, 0, &parts);
    guest.descriptor(TABLE, 0, (INDIRECT_TABLE, 16 * 1024), guest::INDIRECT, 0);
    let chain = walk(&guest).unwrap();
    assert_eq!(chain.writable_bytes(), 1024 * u64::from(u32::MAX));
    assert_eq!(chain.last_writable(), Some(u64::from(u32::MAX) - 1));
}

#[test]
fn something_to_read_after_something_to_write_is_refused() {
    let guest = Guest::simple();
    let why = "something to read after something to write";
    guest.chain(TABLE, 0, &[(DATA, 1, true), (DATA, 1, false)]);
    assert_eq!(refused(&guest), why);
    // In an indirect table too, and across the two.
    guest.chain(INDIRECT_TABLE, 0, &[(DATA, 1, false), (DATA, 1, true)]);
    guest.descriptor(TABLE, 0, (DATA, 1), guest::WRITE | guest::NEXT, 1);
    guest.descriptor(TABLE, 1, (INDIRECT_TABLE, 32), guest::INDIRECT, 0);
    assert_eq!(refused(&guest), why);
}

#[test]
fn an_indirect_table_may_end_a_chain_and_its_write_flag_means_nothing() {
    let guest = Guest::simple();
    guest.chain(INDIRECT_TABLE, 0, &[(DATA, 7, false), (DATA, 3, true)]);
    for flag in [0, guest::WRITE] {
        guest.descriptor(TABLE, 0, (DATA, 2), guest::NEXT, 1);
        guest.descriptor(TABLE, 1, (INDIRECT_TABLE, 32), guest::INDIRECT | flag, 0);
        let chain = walk(&guest).unwrap();
        assert_eq!((chain.readable_bytes(), chain.writable_bytes()), (9, 3));
    }
}

#[test]
fn an_indirect_table_inside_another_or_beside_a_link_is_refused() {
    let guest = Guest::simple();
    guest.descriptor(TABLE, 0, (INDIRECT_TABLE, 32), guest::INDIRECT | guest::NEXT, 1);
    assert_eq!(
        refused(&guest),
        "an indirect table that is not the last of its chain"
    );
    guest.descriptor(TABLE, 0, (INDIRECT_TABLE, 32), guest::INDIRECT, 0);
    for flags in [guest::INDIRECT, guest::INDIRECT | guest::NEXT] {
        guest.descriptor(INDIRECT_TABLE, 0, (INDIRECT_TABLE, 32), flags, 1);
        assert_eq!(refused(&guest), "an indirect table inside another");
    }
}

#[test]
fn an_indirect_table_of_a_wrong_length_or_outside_the_memory_is_refused() {
    let guest = Guest::simple();
    guest.chain(INDIRECT_TABLE, 0, &[(DATA, 1, false)]);
    for len in [0, 1, 15, 17, 16 * 1025, u32::MAX, u32::MAX - 15] {
        guest.descriptor(TABLE, 0, (INDIRECT_TABLE, len), guest::INDIRECT, 0);
        assert_eq!(refused(&guest), "an indirect table of a wrong length", "{len}");
    }
    // All of it must be there, though only its beginning is used.
    for at in [guest::END - 16, guest::END, u64::MAX - 15, u64::MAX] {
        guest.descriptor(TABLE, 0, (at, 32), guest::INDIRECT, 0);
        assert!(outside(&guest), "{at:#x}");
    }
    for at in [INDIRECT_TABLE, INDIRECT_TABLE + 1] {
        guest.chain(at, 0, &[(DATA, 1, false)]);
        guest.descriptor(TABLE, 0, (at, 16), guest::INDIRECT, 0);
        walk(&guest).unwrap();
    }
}

#[test]
fn a_table_that_has_gone_is_told() {
    let guest = Guest::simple();
    guest.chain(TABLE, 0, &[(DATA, 1, false)]);
    rustix::fs::ftruncate(&guest.fd, 0).unwrap();
    assert_eq!(walk(&guest), Err(Fault::Gone));
}
