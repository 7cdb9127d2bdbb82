//! Why a command did not do what was asked: a stable code for programs, one line for people.
//!
//! The line can hold text of the daemon's; control characters are replaced here, once, so that nothing printed can
//! drive a terminal or spread over several lines.

use libvol::Kind;
use libvol::control::{ErrorBody, ErrorDetail};

/// A refused or failed command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Failure {
    code: String,
    message: String,
}

impl Failure {
    /// A failure found by volctl itself.
    pub(crate) fn new(kind: Kind, message: impl AsRef<str>) -> Self {
        Self::from_daemon(kind.code(), message.as_ref())
    }

    /// A refusal as the daemon words it.
    pub(crate) fn from_daemon(code: &str, message: &str) -> Self {
        Self {
            code: one_line(code),
            message: one_line(message),
        }
    }

    /// The line for people.
    pub(crate) fn message(&self) -> &str {
        &self.message
    }

    /// The stable code, as the document has it.
    #[cfg(test)]
    pub(crate) fn code(&self) -> &str {
        &self.code
    }

    /// The document for programs.
    pub(crate) fn body(&self) -> ErrorBody {
        ErrorBody {
            error: ErrorDetail {
                code: self.code.clone(),
                message: self.message.clone(),
            },
        }
    }
}

/// The same text on one line: every run of white space and control characters becomes one space.
pub(crate) fn one_line(text: &str) -> String {
    let mut line = String::with_capacity(text.len());
    for word in text
        .split(|c: char| c.is_whitespace() || c.is_control())
        .filter(|w| !w.is_empty())
    {
        if !line.is_empty() {
            line.push(' ');
        }
        line.push_str(word);
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_of_the_daemons_can_neither_break_the_line_nor_drive_the_terminal() {
        let failure = Failure::from_daemon("busy", "volume\n\x1b[2Jacme/web \t is\u{9b}31m attached\r\n");
        assert_eq!(failure.message(), "volume [2Jacme/web is 31m attached");
    }
}
