//! `docs/FORMAT.md` draws what the code writes: every structure's table is compared with the code's fields.

use std::collections::BTreeMap;

use super::super::{log, record, slots, sums, superblock, table};
use crate::store::wire::Field;

const PAGE: &str = include_str!("../../../../docs/FORMAT.md");

/// Offset, size and name of each field.
type Rows = Vec<(usize, usize, &'static str)>;

/// Tables of the page: after a line `<!-- name size -->`, rows `| offset | size | field | ...`.
fn drawn() -> BTreeMap<&'static str, (usize, Rows)> {
    let mut tables = BTreeMap::new();
    let mut lines = PAGE.lines();
    while let Some(line) = lines.next() {
        let Some(head) = line.strip_prefix("<!-- ").and_then(|l| l.strip_suffix(" -->")) else {
            continue;
        };
        let (name, size) = head.rsplit_once(' ').expect("name and size");
        let rows = lines.by_ref().skip(2).take_while(|row| row.starts_with('|'));
        let row = |row: &'static str| {
            let cells: Vec<_> = row.split('|').map(str::trim).collect();
            (
                cells[1].parse().expect(row),
                cells[2].parse().expect(row),
                cells[3],
            )
        };
        tables.insert(name, (size.parse().expect(head), rows.map(row).collect()));
    }
    tables
}

#[test]
fn every_structure_is_drawn_as_the_code_has_it() {
    let structures: [(&str, usize, &[Field]); 10] = [
        ("superblock", superblock::fields::SIZE, superblock::fields::FIELDS),
        ("slot", slots::fields::SIZE, slots::fields::FIELDS),
        ("key", slots::key_fields::SIZE, slots::key_fields::FIELDS),
        ("page", table::fields::SIZE, table::fields::FIELDS),
        (
            "volume record",
            record::volume_fields::SIZE,
            record::volume_fields::FIELDS,
        ),
        (
            "tombstone",
            record::tombstone_fields::SIZE,
            record::tombstone_fields::FIELDS,
        ),
        (
            "extent record",
            record::extent_fields::SIZE,
            record::extent_fields::FIELDS,
        ),
        ("frame", log::fields::SIZE, log::fields::FIELDS),
        ("log record", log::record_fields::SIZE, log::record_fields::FIELDS),
        ("checksum header", sums::fields::SIZE, sums::fields::FIELDS),
    ];
    let mut drawn = drawn();
    for (name, size, fields) in structures {
        let (drawn_size, rows) = drawn
            .remove(name)
            .unwrap_or_else(|| panic!("{name} is not drawn"));
        let in_code: Vec<_> = fields.iter().map(|f| (f.at, f.len, f.name)).collect();
        assert_eq!((drawn_size, rows), (size, in_code), "{name}");
    }
    assert!(drawn.is_empty(), "drawn, and not in the code: {drawn:?}");
}

#[test]
fn the_fields_of_a_structure_tile_it_without_gap_or_overlap() {
    for (name, (size, rows)) in drawn() {
        let end = rows.iter().fold(0, |at, (offset, len, field)| {
            assert_eq!(*offset, at, "{name}: {field}");
            offset + len
        });
        assert_eq!(end, size, "{name}");
    }
}

#[test]
fn magics_stand_in_the_page() {
    for magic in ["VOLDSUPR", "VOLDSLOT", "VOLDPAGE", "VOLDFRAM", "VOLDSUMS"] {
        assert!(PAGE.contains(&format!("`{magic}`")), "{magic}");
    }
    let all = [
        superblock::MAGIC,
        slots::MAGIC,
        table::MAGIC,
        log::MAGIC,
        sums::MAGIC,
    ];
    for magic in all {
        assert!(PAGE.contains(std::str::from_utf8(&magic).unwrap()));
    }
}
