//! `volctl status` and `volctl version`.

use libvol::control::{Status, Version};
use serde::Serialize;

use crate::Session;
use crate::failure::{Failure, one_line};
use crate::render::{Human, facts, rows};
use crate::units::span;

/// This program's version.
const VOLCTL: &str = env!("CARGO_PKG_VERSION");

/// Carries out `status`.
pub(crate) async fn status(session: &Session) -> Result<(), Failure> {
    session.show(&session.client.get::<Status>("/v1/status").await?)
}

/// Carries out `version`.
pub(crate) async fn version(session: &Session) -> Result<(), Failure> {
    let daemon = session.client.get("/v1/version").await?;
    session.show(&Versions {
        daemon,
        volctl: VOLCTL,
    })
}

/// The daemon's answer with volctl's own version beside it.
#[derive(Serialize)]
struct Versions {
    #[serde(flatten)]
    daemon: Version,
    volctl: &'static str,
}

impl Human for Versions {
    fn human(&self) -> String {
        facts(&[
            ("volctl", Some(self.volctl.into())),
            ("vold", Some(self.daemon.version.clone())),
            ("Store format", Some(self.daemon.store_format.to_string())),
            ("I/O engine", Some(self.daemon.io_engine.clone())),
        ])
    }
}

impl Human for Status {
    fn human(&self) -> String {
        let mut text = facts(&[
            (
                "vold",
                Some(format!("{}, up {}", self.version, span(self.uptime_seconds))),
            ),
            (
                "I/O engine",
                Some(format!("{}, {} shards", self.io_engine, self.shards)),
            ),
            ("Customers", Some(self.customers.to_string())),
            ("VMs", Some(self.vms.to_string())),
            (
                "Volumes",
                Some(format!(
                    "{}, {} attached, {} being destroyed",
                    self.volumes, self.attachments, self.destroying
                )),
            ),
            (
                "Clients",
                Some(format!(
                    "{} connections, {} in their handshake; {} tasks",
                    self.connections, self.handshakes, self.tasks
                )),
            ),
        ]);
        if !self.stores.is_empty() {
            text += &format!("\n\n{}", rows(&self.stores));
        }
        if !self.warnings.is_empty() {
            text += "\n\nNeeds an operator:";
            for warning in &self.warnings {
                text += &format!("\n  {}", one_line(warning));
            }
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status() -> Status {
        Status {
            version: "0.1.0".into(),
            uptime_seconds: 61,
            io_engine: "io_uring".into(),
            shards: 2,
            stores: vec![],
            customers: 2,
            vms: 3,
            volumes: 4,
            attachments: 1,
            destroying: 0,
            connections: 5,
            handshakes: 0,
            tasks: 21,
            warnings: vec![],
        }
    }

    #[test]
    fn a_healthy_host_is_a_few_lines() {
        let expected = "\
vold        0.1.0, up 1 min 1 s
I/O engine  io_uring, 2 shards
Customers   2
VMs         3
Volumes     4, 1 attached, 0 being destroyed
Clients     5 connections, 0 in their handshake; 21 tasks";
        assert_eq!(status().human(), expected);
    }

    #[test]
    fn warnings_come_last_where_they_are_seen() {
        let mut status = status();
        status.warnings = vec!["store \"b\" is away".into()];
        assert!(
            status
                .human()
                .ends_with("\n\nNeeds an operator:\n  store \"b\" is away")
        );
    }

    #[test]
    fn version_is_one_flat_document() {
        let versions = Versions {
            daemon: Version {
                version: "0.1.0".into(),
                store_format: 1,
                io_engine: "threads".into(),
            },
            volctl: "0.1.0",
        };
        let json = serde_json::to_value(&versions).unwrap();
        let expected = serde_json::json!({"version": "0.1.0", "store_format": 1, "io_engine": "threads", "volctl": "0.1.0"});
        assert_eq!(json, expected);
    }
}
