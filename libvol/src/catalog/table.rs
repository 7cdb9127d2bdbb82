//! Typed records over redb: one table a noun, keyed by id, and beside it an index of unique names.

use std::borrow::Borrow;
use std::path::Path;

use redb::{
    ReadTransaction, ReadableTable, ReadableTableMetadata, TableDefinition, TableError, WriteTransaction,
};
use serde::Serialize;
use serde::de::DeserializeOwned;
use uuid::Uuid;

use super::failed;
use super::records::{
    AttachmentRecord, CustomerRecord, DestroyRecord, ScrubRecord, StoreRecord, Tombstone, VmRecord,
    VolumeRecord,
};
use crate::error::{Error, Result};

const META: TableDefinition<'static, &str, u128> = TableDefinition::new("meta");

/// A kind of record.
pub trait Record: Serialize + DeserializeOwned {
    /// Its id.
    type Id: Into<Uuid> + Copy + std::fmt::Display;
    /// For messages.
    const NOUN: &'static str;
    /// Name of its table.
    const TABLE: &'static str;
    /// Its id.
    fn id(&self) -> Self::Id;
    /// What no other record of its kind may have, if there is such a thing.
    fn unique(&self) -> Option<String>;
}

fn table_of<R: Record>() -> TableDefinition<'static, u128, &'static [u8]> {
    TableDefinition::new(R::TABLE)
}

/// The index of a record's unique names: `TABLE/names`.
fn names_of(name: &str) -> TableDefinition<'_, &'static str, u128> {
    TableDefinition::new(name)
}

fn names_table<R: Record>() -> String {
    format!("{}/names", R::TABLE)
}

fn key<R: Record>(id: R::Id) -> u128 {
    id.into().as_u128()
}

/// A consistent state to look at, of a read transaction or inside a write.
pub struct View<'a> {
    source: Source<'a>,
    path: &'a Path,
}

enum Source<'a> {
    Read(&'a ReadTransaction),
    Write(&'a WriteTransaction),
}

/// Runs `$body` with `$table` bound to the open table of either kind of transaction; absent tables are empty.
macro_rules! with_table {
    ($view:expr, $definition:expr, $empty:expr, |$table:ident| $body:expr) => {
        match $view.source {
            Source::Read(transaction) => match transaction.open_table($definition) {
                Ok($table) => $body,
                Err(TableError::TableDoesNotExist(_)) => $empty,
                Err(e) => return Err(failed($view.path, e)),
            },
            Source::Write(transaction) => {
                let $table = transaction
                    .open_table($definition)
                    .map_err(|e| failed($view.path, e))?;
                $body
            }
        }
    };
}

impl<'a> View<'a> {
    pub(super) fn of_read(transaction: &'a ReadTransaction, path: &'a Path) -> Self {
        Self {
            source: Source::Read(transaction),
            path,
        }
    }

    /// The record of that id.
    ///
    /// # Errors
    /// `Damaged`, `Io`.
    pub fn get<R: Record>(&self, id: R::Id) -> Result<Option<R>> {
        with_table!(self, table_of::<R>(), Ok(None), |table| {
            let found = table.get(key::<R>(id)).map_err(|e| failed(self.path, e))?;
            found.map(|value| self.parse::<R>(value.value())).transpose()
        })
    }

    /// The record of that unique name.
    ///
    /// # Errors
    /// `Damaged`, `Io`.
    pub fn named<R: Record>(&self, name: impl Borrow<str>) -> Result<Option<R>> {
        let Some(id) = self.id_of::<R>(name.borrow())? else {
            return Ok(None);
        };
        with_table!(self, table_of::<R>(), Ok(None), |table| {
            let found = table.get(id).map_err(|e| failed(self.path, e))?;
            found.map(|value| self.parse::<R>(value.value())).transpose()
        })
    }

    /// All records, sorted by name (by id where there is none).
    ///
    /// # Errors
    /// `Damaged`, `Io`.
    pub fn all<R: Record>(&self) -> Result<Vec<R>> {
        let mut all: Vec<R> = with_table!(self, table_of::<R>(), Vec::new(), |table| {
            let rows = table.iter().map_err(|e| failed(self.path, e))?;
            rows.map(|row| {
                let (_, value) = row.map_err(|e| failed(self.path, e))?;
                self.parse::<R>(value.value())
            })
            .collect::<Result<_>>()?
        });
        all.sort_by_cached_key(|record| record.unique());
        Ok(all)
    }

    /// How many there are.
    ///
    /// # Errors
    /// `Io`.
    pub fn count<R: Record>(&self) -> Result<usize> {
        with_table!(self, table_of::<R>(), Ok(0), |table| {
            let count = table.len().map_err(|e| failed(self.path, e))?;
            Ok(usize::try_from(count).unwrap_or(usize::MAX))
        })
    }

    pub(super) fn number(&self, name: &str) -> Result<Option<u64>> {
        // The installation id is the only value beyond 64 bits.
        Ok(self.meta(name)?.and_then(|value| u64::try_from(value).ok()))
    }

    pub(super) fn id(&self, name: &str) -> Result<Option<Uuid>> {
        Ok(self.meta(name)?.map(Uuid::from_u128))
    }

    fn meta(&self, name: &str) -> Result<Option<u128>> {
        with_table!(self, META, Ok(None), |table| {
            let found = table.get(name).map_err(|e| failed(self.path, e))?;
            Ok(found.map(|value| value.value()))
        })
    }

    fn id_of<R: Record>(&self, name: &str) -> Result<Option<u128>> {
        let names = names_table::<R>();
        with_table!(self, names_of(&names), Ok(None), |table| {
            let found = table.get(name).map_err(|e| failed(self.path, e))?;
            Ok(found.map(|value| value.value()))
        })
    }

    fn parse<R: Record>(&self, bytes: &[u8]) -> Result<R> {
        serde_json::from_slice(bytes).map_err(|e| {
            Error::damaged(format!(
                "{}: a {} record cannot be read ({e}); restore the catalog, or rebuild it from the stores",
                self.path.display(),
                R::NOUN
            ))
        })
    }
}

/// A write transaction; everything a [`View`] can, and changes.
pub struct Tx<'a> {
    view: View<'a>,
    transaction: &'a WriteTransaction,
}

impl<'a> std::ops::Deref for Tx<'a> {
    type Target = View<'a>;
    fn deref(&self) -> &View<'a> {
        &self.view
    }
}

impl<'a> Tx<'a> {
    pub(super) fn new(transaction: &'a WriteTransaction, path: &'a Path) -> Self {
        Self {
            view: View {
                source: Source::Write(transaction),
                path,
            },
            transaction,
        }
    }

    /// Adds a new record.
    ///
    /// # Errors
    /// `Exists` when its unique name is taken; `Io`.
    pub fn insert<R: Record>(&self, record: &R) -> Result<()> {
        if let Some(name) = record.unique()
            && self.id_of::<R>(&name)?.is_some()
        {
            return Err(Error::exists(format!(
                "{} {name:?} exists already; choose another name",
                R::NOUN
            )));
        }
        assert!(self.get::<R>(record.id())?.is_none(), "a fresh id");
        self.put(record)
    }

    /// Replaces the record of the same id, and its name.
    ///
    /// # Errors
    /// `NotFound` when there is none, `Exists` when its new name is another's; `Io`.
    pub fn update<R: Record>(&self, record: &R) -> Result<()> {
        self.remove::<R>(record.id())?;
        if let Some(name) = record.unique()
            && self.id_of::<R>(&name)?.is_some()
        {
            return Err(Error::exists(format!(
                "{} {name:?} exists already; choose another name",
                R::NOUN
            )));
        }
        self.put(record)
    }

    /// Adds the record, or replaces the one of the same id.
    ///
    /// # Errors
    /// As [`Tx::insert`] and [`Tx::update`].
    pub fn upsert<R: Record>(&self, record: &R) -> Result<()> {
        match self.get::<R>(record.id())? {
            Some(_) => self.update(record),
            None => self.insert(record),
        }
    }

    /// Removes the record and its name.
    ///
    /// # Errors
    /// `NotFound` when there is none; `Io`.
    pub fn remove<R: Record>(&self, id: R::Id) -> Result<()> {
        let Some(old) = self.get::<R>(id)? else {
            return Err(Error::not_found(format!("there is no {} {id}", R::NOUN)));
        };
        let path = self.view.path;
        if let Some(name) = old.unique() {
            let names = names_table::<R>();
            let mut table = self
                .transaction
                .open_table(names_of(&names))
                .map_err(|e| failed(path, e))?;
            table.remove(name.as_str()).map_err(|e| failed(path, e))?;
        }
        let mut table = self
            .transaction
            .open_table(table_of::<R>())
            .map_err(|e| failed(path, e))?;
        table.remove(key::<R>(id)).map_err(|e| failed(path, e))?;
        Ok(())
    }

    fn put<R: Record>(&self, record: &R) -> Result<()> {
        let path = self.view.path;
        let bytes = serde_json::to_vec(record).expect("records serialise");
        let id = key::<R>(record.id());
        if let Some(name) = record.unique() {
            let names = names_table::<R>();
            let mut table = self
                .transaction
                .open_table(names_of(&names))
                .map_err(|e| failed(path, e))?;
            table.insert(name.as_str(), id).map_err(|e| failed(path, e))?;
        }
        let mut table = self
            .transaction
            .open_table(table_of::<R>())
            .map_err(|e| failed(path, e))?;
        table.insert(id, &bytes[..]).map_err(|e| failed(path, e))?;
        Ok(())
    }

    pub(super) fn create_tables(&self) -> Result<()> {
        self.create::<StoreRecord>()?;
        self.create::<CustomerRecord>()?;
        self.create::<VmRecord>()?;
        self.create::<VolumeRecord>()?;
        self.create::<AttachmentRecord>()?;
        self.create::<DestroyRecord>()?;
        self.create::<ScrubRecord>()?;
        self.create::<Tombstone>()
    }

    fn create<R: Record>(&self) -> Result<()> {
        let path = self.view.path;
        let names = names_table::<R>();
        self.transaction
            .open_table(names_of(&names))
            .map_err(|e| failed(path, e))?;
        self.transaction
            .open_table(table_of::<R>())
            .map_err(|e| failed(path, e))?;
        Ok(())
    }

    pub(super) fn set_number(&self, name: &str, value: u64) -> Result<()> {
        self.set_meta(name, u128::from(value))
    }

    pub(super) fn set_id(&self, name: &str, id: Uuid) -> Result<()> {
        self.set_meta(name, id.as_u128())
    }

    fn set_meta(&self, name: &str, value: u128) -> Result<()> {
        let path = self.view.path;
        let mut table = self.transaction.open_table(META).map_err(|e| failed(path, e))?;
        table.insert(name, value).map_err(|e| failed(path, e))?;
        Ok(())
    }
}
