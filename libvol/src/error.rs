//! One error type: a kind to act on, a message for people, a source for engineers.

use std::fmt;

/// What went wrong, as far as a caller can act on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// The request itself is wrong (a name, a size, a range).
    Invalid,
    /// Something of that name is there already.
    Exists,
    /// Nothing of that name, or nothing that the caller may know of.
    NotFound,
    /// Policy says no.
    Refused,
    /// In use, or in a state that does not allow this now.
    Busy,
    /// No free extent, slot or place within a limit.
    NoSpace,
    /// The volume or store may not be written.
    ReadOnly,
    /// A device failed, or served something that cannot be used.
    Io,
    /// Stored bytes contradict their checksum or structure.
    Damaged,
    /// The thing exists but is stopped (faulty store, failed volume, shutting down).
    Unavailable,
    /// A version, feature or medium that this build does not support.
    Unsupported,
    /// A broken promise of vold's own.
    Internal,
}

impl Kind {
    /// Stable name, as in the API's `error.code`.
    pub fn code(self) -> &'static str {
        match self {
            Kind::Invalid => "invalid",
            Kind::Exists => "exists",
            Kind::NotFound => "not_found",
            Kind::Refused => "refused",
            Kind::Busy => "busy",
            Kind::NoSpace => "no_space",
            Kind::ReadOnly => "read_only",
            Kind::Io => "io",
            Kind::Damaged => "damaged",
            Kind::Unavailable => "unavailable",
            Kind::Unsupported => "unsupported",
            Kind::Internal => "internal",
        }
    }
}

/// An operating error. Messages name the thing, the reason and the next step, in one line.
pub struct Error {
    kind: Kind,
    message: String,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

/// Result with [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// An error of `kind` with the line people see.
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self {
            kind,
            message: message.into(),
            source: None,
        }
    }

    /// The same with the error that caused it.
    pub fn with_source(
        kind: Kind,
        message: impl Into<String>,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        Self {
            kind,
            message: message.into(),
            source: Some(source.into()),
        }
    }

    /// What a caller can act on.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// The line people see, without the source.
    pub fn message(&self) -> &str {
        &self.message
    }

    /// The same error with `context: ` in front of its message.
    #[must_use]
    pub fn context(mut self, context: impl fmt::Display) -> Self {
        self.message = format!("{context}: {}", self.message);
        self
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        if let Some(source) = &self.source {
            write!(f, ": {source}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {self}", self.kind.code())
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_ref().map(|s| &**s as _)
    }
}

macro_rules! shorthand {
    ($($name:ident $kind:ident),* $(,)?) => {
        impl Error {
            $(
                #[doc = concat!("An error of [`Kind::", stringify!($kind), "`].")]
                pub fn $name(message: impl Into<String>) -> Self {
                    Self::new(Kind::$kind, message)
                }
            )*
        }
    };
}

shorthand! {
    invalid Invalid, exists Exists, not_found NotFound, refused Refused, busy Busy, no_space NoSpace,
    read_only ReadOnly, io Io, damaged Damaged, unavailable Unavailable, unsupported Unsupported, internal Internal,
}
