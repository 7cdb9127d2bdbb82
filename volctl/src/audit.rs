//! `volctl audit`: what was done, by whom, and whether the log of it is unbroken.

use clap::Subcommand;
use libvol::control::{AuditEntry, AuditVerified, List};

use crate::Session;
use crate::failure::Failure;
use crate::render::{Column, Human, Row, facts, word};
use crate::units::time;

/// What to do with the audit log.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// The last entries, or those after a given one
    List {
        /// Only entries after this number (default: the last ones)
        #[arg(long, value_name = "NUMBER")]
        after: Option<u64>,
        /// At most so many, up to 1000
        #[arg(long, value_name = "COUNT", default_value_t = 50)]
        limit: usize,
    },
    /// Verify that no entry was changed, taken out or put in; prints the digest of the last one, to keep elsewhere
    Verify,
}

/// Carries it out.
pub(crate) async fn run(session: &Session, command: Command) -> Result<(), Failure> {
    match command {
        Command::List { after, limit } => {
            let after = after.map_or_else(String::new, |after| format!("&after={after}"));
            let path = format!("/v1/audit?limit={limit}{after}");
            session.show(&session.client.get::<List<AuditEntry>>(&path).await?)
        }
        Command::Verify => session.show(&session.client.get::<AuditVerified>("/v1/audit/verify").await?),
    }
}

impl Row for AuditEntry {
    const COLUMNS: &'static [Column] = &[
        Column::Number("NUMBER"),
        Column::Text("TIME"),
        Column::Text("WHO"),
        Column::Text("WHAT"),
        Column::Text("TO WHAT"),
        Column::Text("OUTCOME"),
        Column::Text("DETAIL"),
    ];
    const NONE: &'static str = "nothing has been written to the audit log yet";

    fn cells(&self) -> Vec<String> {
        let or_none = |text: &str| {
            if text.is_empty() {
                "-".to_owned()
            } else {
                text.to_owned()
            }
        };
        vec![
            self.seq.to_string(),
            time(self.unix_seconds),
            self.actor.clone(),
            self.action.clone(),
            or_none(&self.subject),
            word(&self.outcome),
            or_none(&self.detail),
        ]
    }
}

impl Human for AuditVerified {
    fn human(&self) -> String {
        facts(&[
            ("entries", Some(self.entries.to_string())),
            ("first", Some(self.first.to_string())),
            ("last", Some(self.last.to_string())),
            ("digest of the last", Some(self.head.clone())),
        ])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use libvol::control::AuditOutcome;

    #[test]
    fn an_entry_fills_every_column_and_shows_who_was_refused_what_and_why() {
        let entry = AuditEntry {
            seq: 7,
            unix_seconds: 0,
            actor: "uid 0".into(),
            action: "volume.attach".into(),
            subject: "acme/web to vm2".into(),
            outcome: AuditOutcome::Refused,
            detail: "it is another customer's".into(),
            previous: "0".repeat(64),
        };
        let cells = entry.cells();
        assert_eq!(cells.len(), AuditEntry::COLUMNS.len());
        assert_eq!(cells[5], "refused");
        assert_eq!(cells[6], "it is another customer's");
        let quiet = AuditEntry {
            detail: String::new(),
            ..entry
        };
        assert_eq!(quiet.cells()[6], "-");
    }
}
