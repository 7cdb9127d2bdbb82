//! What a command prints: aligned tables and lists of facts for people, one JSON document for programs.
//!
//! JSON is the daemon's own answer, field for field ([`libvol::control`]). Tables have no lines and no colours and do
//! not depend on the terminal's width, so that `grep` and `awk` can read them too. Progress does not belong here: it
//! goes to standard error (see `destroy.rs`).

use std::io::{self, Write};

use comfy_table::{CellAlignment, Table, presets};
use libvol::Kind;
use libvol::control::List;
use serde::Serialize;

use crate::args::Format;
use crate::failure::{Failure, one_line};

/// Something that can be shown to people.
pub(crate) trait Human {
    /// Lines, without the last line's end.
    fn human(&self) -> String;
}

/// Something that fills a line of a table.
pub(crate) trait Row {
    /// The table's head.
    const COLUMNS: &'static [Column];
    /// What to say instead of an empty table: the next step.
    const NONE: &'static str;
    /// One cell a column.
    fn cells(&self) -> Vec<String>;
}

/// A column: its head and to which side it is aligned.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Column {
    /// Aligned left.
    Text(&'static str),
    /// Aligned right.
    Number(&'static str),
}

impl<T: Row> Human for List<T> {
    fn human(&self) -> String {
        if self.items.is_empty() {
            return T::NONE.to_owned();
        }
        rows(&self.items)
    }
}

/// A table of `items`, head included even if there are none.
pub(crate) fn rows<T: Row>(items: &[T]) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header(T::COLUMNS.iter().map(|column| match column {
        Column::Text(head) | Column::Number(head) => *head,
    }));
    for item in items {
        table.add_row(item.cells().iter().map(|cell| one_line(cell)));
    }
    for (index, column) in T::COLUMNS.iter().enumerate() {
        let shown = table.column_mut(index).expect("the header made every column");
        shown.set_padding((0, 2));
        if matches!(column, Column::Number(_)) {
            shown.set_cell_alignment(CellAlignment::Right);
        }
    }
    table.trim_fmt()
}

/// One fact a line, values in one column. Facts without a value are left out.
pub(crate) fn facts(facts: &[(&str, Option<String>)]) -> String {
    let width = facts.iter().map(|(label, _)| label.len()).max().unwrap_or(0);
    let lines: Vec<String> = facts
        .iter()
        .filter_map(|(label, value)| value.as_ref().map(|value| (label, one_line(value))))
        .map(|(label, value)| format!("{label:width$}  {value}"))
        .collect();
    lines.join("\n")
}

/// A unit-like enum as the API spells it: `in_place`, `vhost-user`.
pub(crate) fn word<T: Serialize>(value: &T) -> String {
    match serde_json::to_value(value) {
        Ok(serde_json::Value::String(word)) => word,
        other => panic!("only enums without fields have a word of their own, not {other:?}"),
    }
}

/// What goes to standard output for `value`.
pub(crate) fn document<T: Serialize + Human>(format: Format, value: &T) -> String {
    match format {
        Format::Table => value.human(),
        Format::Json => json(value),
    }
}

/// One JSON document.
pub(crate) fn json<T: Serialize>(value: &T) -> String {
    serde_json::to_string_pretty(value).expect("API types have string keys and cannot fail to be written")
}

/// Writes `document` and a line's end to standard output. A reader that has gone away (`| head`) is no failure: the
/// command was done.
///
/// # Errors
/// `io` when standard output cannot be written for any other reason.
pub(crate) fn print(document: &str) -> Result<(), Failure> {
    print_to(&mut io::stdout().lock(), document)
}

fn print_to(out: &mut impl Write, document: &str) -> Result<(), Failure> {
    let written = writeln!(out, "{document}").and_then(|()| out.flush());
    match written {
        Err(e) if e.kind() != io::ErrorKind::BrokenPipe => Err(Failure::new(
            Kind::Io,
            format!(
                "standard output: {e}; the command was carried out, only its result could not be printed"
            ),
        )),
        _ => Ok(()),
    }
}

/// Writes one line to standard error; nobody can be told if that fails.
pub(crate) fn note(line: &str) {
    let _ = writeln!(io::stderr().lock(), "{line}");
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Fruit(&'static str, u64);

    impl Row for Fruit {
        const COLUMNS: &'static [Column] = &[
            Column::Text("NAME"),
            Column::Number("WEIGHT"),
            Column::Text("NOTE"),
        ];
        const NONE: &'static str = "no fruit";
        fn cells(&self) -> Vec<String> {
            vec![self.0.into(), self.1.to_string(), "ripe\nand\x1b[31m red".into()]
        }
    }

    #[test]
    fn a_table_aligns_text_left_numbers_right_and_keeps_a_row_on_one_line() {
        let list = List {
            items: vec![Fruit("fig", 5), Fruit("watermelon", 12_000)],
        };
        let expected = "\
NAME        WEIGHT  NOTE
fig              5  ripe and [31m red
watermelon   12000  ripe and [31m red";
        assert_eq!(list.human(), expected);
    }

    #[test]
    fn an_empty_list_names_the_next_step() {
        assert_eq!(List::<Fruit> { items: vec![] }.human(), "no fruit");
    }

    #[test]
    fn facts_line_up_and_unknown_ones_are_left_out() {
        let text = facts(&[
            ("Name", Some("a".into())),
            ("Reason", None),
            ("Extent size", Some("4 MiB".into())),
        ]);
        assert_eq!(text, "Name         a\nExtent size  4 MiB");
    }

    struct Broken(io::ErrorKind);

    impl Write for Broken {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(self.0.into())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_closed_pipe_is_no_failure_and_a_full_disk_is_one() {
        assert_eq!(print_to(&mut Broken(io::ErrorKind::BrokenPipe), "x"), Ok(()));
        assert!(print_to(&mut Broken(io::ErrorKind::StorageFull), "x").is_err());
    }
}
