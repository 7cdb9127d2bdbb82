//! Newtypes for every id, name and index, so that none is taken for another.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::error::Error;

macro_rules! uuid_ids {
    ($($(#[$doc:meta])* $name:ident),* $(,)?) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub Uuid);

        impl $name {
            /// A fresh random id (UUID v4).
            pub fn random() -> Self {
                Self(Uuid::new_v4())
            }

            /// All zero: never a real id.
            pub const NIL: Self = Self(Uuid::nil());

            /// The 16 bytes as stored, in UUID (big-endian) order.
            pub fn as_bytes(&self) -> &[u8; 16] {
                self.0.as_bytes()
            }

            /// From the 16 stored bytes.
            pub fn from_bytes(bytes: [u8; 16]) -> Self {
                Self(Uuid::from_bytes(bytes))
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self.0)
            }
        }

        impl FromStr for $name {
            type Err = Error;
            fn from_str(s: &str) -> Result<Self, Error> {
                Uuid::parse_str(s).map(Self).map_err(|_| {
                    Error::invalid(format!("{s:?} is not an id; ids are UUIDs, as the list commands print them"))
                })
            }
        }
    )*};
}

uuid_ids! {
    /// One data directory of vold: its catalog and keystore.
    InstallationId,
    /// One store.
    StoreId,
    /// One opening of a store: drawn anew each time, so that an old copy of the store is told from it.
    Incarnation,
    /// One customer.
    CustomerId,
    /// One VM.
    VmId,
    /// One volume.
    VolumeId,
    /// The scope of one data key: extents and checksums carry it. A clone shares its parent's for old extents.
    DatasetId,
    /// One attachment of a volume to a VM.
    AttachmentId,
    /// One customer master key.
    CmkId,
}

macro_rules! numbers {
    ($($(#[$doc:meta])* $name:ident $int:ty),* $(,)?) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub $int);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    )*};
}

numbers! {
    /// Number of a 4 KiB block within a volume.
    BlockIndex u64,
    /// Logical extent of a volume.
    ExtentIndex u32,
    /// Data extent of a store.
    PhysicalExtent u32,
    /// Attachment epoch or membership epoch; the field's name says which.
    Epoch u64,
    /// Version of a data key within its dataset, from 1.
    KeyVersion u32,
}

/// A set of a volume's replicas: bit `i` is the replica at place `i` of the slot's list of stores.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct ReplicaSet(pub u8);

impl ReplicaSet {
    /// No replica.
    pub const NONE: Self = Self(0);

    /// Only that one.
    pub fn only(replica: usize) -> Self {
        Self(1 << replica)
    }

    /// Whether it is in the set.
    pub fn contains(self, replica: usize) -> bool {
        self.0 >> replica & 1 == 1
    }

    /// With it.
    #[must_use]
    pub fn with(self, replica: usize) -> Self {
        Self(self.0 | 1 << replica)
    }

    /// Without it.
    #[must_use]
    pub fn without(self, replica: usize) -> Self {
        Self(self.0 & !(1 << replica))
    }

    /// Those of either.
    #[must_use]
    pub fn or(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Those of both.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    /// Those that are not in `other`.
    #[must_use]
    pub fn minus(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    /// How many.
    pub fn len(self) -> usize {
        self.0.count_ones() as usize
    }

    /// Whether there is none.
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Its members, ascending.
    pub fn iter(self) -> impl Iterator<Item = usize> {
        (0..8).filter(move |replica| self.contains(*replica))
    }
}

/// Longest customer, VM, volume or store name.
pub const NAME_BYTES_MAX: usize = 63;

/// A checked name: `[a-z0-9][a-z0-9-]{0,62}`.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Name(String);

impl Name {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Name {
    type Err = Error;
    fn from_str(s: &str) -> Result<Self, Error> {
        let ok = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit();
        let bytes = s.as_bytes();
        let valid = matches!(bytes.first(), Some(c) if ok(*c))
            && bytes.len() <= NAME_BYTES_MAX
            && bytes.iter().all(|c| ok(*c) || *c == b'-');
        if !valid {
            return Err(Error::invalid(format!(
                "{:?} is not a valid name; use 1 to 63 of a-z, 0-9 and '-', beginning with a letter or digit",
                s.chars().take(80).collect::<String>()
            )));
        }
        Ok(Self(s.to_owned()))
    }
}

impl TryFrom<String> for Name {
    type Error = Error;
    fn try_from(s: String) -> Result<Self, Error> {
        s.parse()
    }
}

impl From<Name> for String {
    fn from(name: Name) -> String {
        name.0
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.0)
    }
}

/// A volume's full name: `CUSTOMER/NAME`.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct VolumePath {
    /// Whose it is.
    pub customer: Name,
    /// Its name among the customer's volumes.
    pub name: Name,
}

impl FromStr for VolumePath {
    type Err = Error;
    fn from_str(s: &str) -> Result<Self, Error> {
        let Some((customer, name)) = s.split_once('/') else {
            return Err(Error::invalid(format!(
                "{:?} is not a volume; write CUSTOMER/NAME, for example acme/web",
                s.chars().take(160).collect::<String>()
            )));
        };
        Ok(Self {
            customer: customer.parse()?,
            name: name.parse()?,
        })
    }
}

impl TryFrom<String> for VolumePath {
    type Error = Error;
    fn try_from(s: String) -> Result<Self, Error> {
        s.parse()
    }
}

impl From<VolumePath> for String {
    fn from(path: VolumePath) -> String {
        path.to_string()
    }
}

impl fmt::Display for VolumePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.customer, self.name)
    }
}

impl fmt::Debug for VolumePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{self}\"")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_lower_case_letters_digits_and_inner_dashes_up_to_63_bytes() {
        for good in ["a", "0", "web-1", "a-", &"x".repeat(63)] {
            assert!(good.parse::<Name>().is_ok(), "{good}");
        }
        for bad in [
            "",
            "-a",
            "A",
            "a_b",
            "a/b",
            "ä",
            "a b",
            "a\0",
            "..",
            &"x".repeat(64),
        ] {
            assert!(bad.parse::<Name>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_volume_path_has_exactly_one_slash() {
        assert_eq!("acme/web".parse::<VolumePath>().unwrap().to_string(), "acme/web");
        for bad in ["acme", "acme/", "/web", "acme/web/x", "Acme/web"] {
            assert!(bad.parse::<VolumePath>().is_err(), "{bad}");
        }
    }
}
