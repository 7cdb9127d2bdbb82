//! `volctl store`: the files and block devices that hold extents.

use std::time::Duration;

use clap::Subcommand;
use libvol::Kind;
use libvol::control::{Done, List, Store, StoreAdd, StoreDrain, StoreState};
use libvol::ids::Name;

use crate::Session;
use crate::failure::Failure;
use crate::render::{Column, Human, Row, facts, word};
use crate::units::{parse_size, size};

/// What to do with stores.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Create a store in a new file, or on a block device, and use it
    Add {
        /// Its name
        name: Name,
        /// The file to create, or an existing block device
        #[arg(long, value_name = "PATH")]
        path: String,
        /// Its size; needed for a file, and at most the device's for a device (default: all of it)
        #[arg(long, value_name = "SIZE", value_parser = parse_size)]
        size: Option<u64>,
        /// What fails together with it; a volume's replicas are in different zones (default: a zone of its own)
        #[arg(long, value_name = "ZONE")]
        zone: Option<Name>,
        /// Unit of allocation, fixed for the store's life: 1M to 64M (default: 4M)
        #[arg(long, value_name = "SIZE", value_parser = parse_size)]
        extent_size: Option<u64>,
        /// Accept a file system without O_DIRECT; what was destroyed there cannot be verified on the device
        #[arg(long)]
        allow_buffered: bool,
    },
    /// All stores
    List,
    /// One store with all its facts
    Show {
        /// Its name
        name: Name,
    },
    /// Use a faulty store again, after you have looked at its device; its replicas catch up
    Reopen {
        /// Its name
        name: Name,
    },
    /// Move all replicas off a store while they serve; new ones go elsewhere
    Drain {
        /// Its name
        name: Name,
        /// Leave what is still there, and use the store as before
        #[arg(long, conflicts_with = "wait")]
        cancel: bool,
        /// Return only when the store is empty, and all that was on it is overwritten
        #[arg(long)]
        wait: bool,
    },
    /// Give up a store that holds nothing any more
    Remove {
        /// Its name
        name: Name,
        /// It will not come back: replace its replicas from the others
        #[arg(long)]
        lost: bool,
    },
}

/// Carries it out.
pub(crate) async fn run(session: &Session, command: Command) -> Result<(), Failure> {
    match command {
        Command::Add {
            name,
            path,
            size,
            zone,
            extent_size,
            allow_buffered,
        } => {
            let body = StoreAdd {
                name,
                path: absolute(path)?,
                size_bytes: size,
                zone,
                extent_bytes: extent_size,
                allow_buffered,
            };
            session.show(&session.client.post::<Store>("/v1/stores", &body).await?)
        }
        Command::List => session.show(&session.client.get::<List<Store>>("/v1/stores").await?),
        Command::Show { name } => {
            session.show(&session.client.get::<Store>(&format!("/v1/stores/{name}")).await?)
        }
        Command::Reopen { name } => session.show(
            &session
                .client
                .post::<Store>(&format!("/v1/stores/{name}/reopen"), &serde_json::json!({}))
                .await?,
        ),
        Command::Drain { name, cancel, wait } => {
            let path = format!("/v1/stores/{name}/drain");
            let mut store: Store = session.client.post(&path, &StoreDrain { cancel }).await?;
            if wait {
                store = drained(session, store).await?;
            }
            session.show(&store)
        }
        Command::Remove { name, lost: true } => {
            let path = format!("/v1/stores/{name}?lost=true");
            let done: Done = session.client.delete(&path).await?;
            session.done(
                &done,
                &format!("store \"{name}\" given up as lost; its replicas are being replaced (volctl status shows what is left), then it is forgotten"),
            )
        }
        Command::Remove { name, lost: false } => {
            let done: Done = session.client.delete(&format!("/v1/stores/{name}")).await?;
            session.done(
                &done,
                &format!("store \"{name}\" removed; its file or device is yours again"),
            )
        }
    }
}

/// Asks until a draining store is empty. What is still to be done goes to standard error, a line for each change.
async fn drained(session: &Session, mut store: Store) -> Result<Store, Failure> {
    /// Between two questions.
    const PAUSE: Duration = Duration::from_millis(500);
    let mut told = None;
    while store.state == StoreState::Draining {
        if store.reason != told {
            eprintln!(
                "store \"{}\": {}",
                store.name,
                store.reason.as_deref().unwrap_or("draining")
            );
            told.clone_from(&store.reason);
        }
        tokio::time::sleep(PAUSE).await;
        store = session.client.get(&format!("/v1/stores/{}", store.name)).await?;
    }
    match store.state {
        StoreState::Drained => Ok(store),
        StoreState::Offline | StoreState::Faulty => Err(Failure::new(
            Kind::Unavailable,
            format!(
                "store \"{}\" is {} ({}); the drain goes on by itself when it is back, and --wait can be repeated",
                store.name,
                word(&store.state),
                store.reason.as_deref().unwrap_or("no reason known")
            ),
        )),
        _ => Err(Failure::new(
            Kind::Unavailable,
            format!(
                "store \"{}\" is no longer being drained ({}): {}",
                store.name,
                word(&store.state),
                store.reason.as_deref().unwrap_or("called off")
            ),
        )),
    }
}

/// The daemon has another working directory: a relative path is completed here.
fn absolute(path: String) -> Result<String, Failure> {
    let complete = std::path::absolute(&path).map_err(|e| {
        Failure::new(
            Kind::Invalid,
            format!("path {path:?}: {e}; write an absolute path"),
        )
    })?;
    complete.into_os_string().into_string().map_err(|_| {
        Failure::new(
            Kind::Invalid,
            format!("path {path:?}: the working directory is not UTF-8; write an absolute path"),
        )
    })
}

impl Row for Store {
    const COLUMNS: &'static [Column] = &[
        Column::Text("NAME"),
        Column::Text("ZONE"),
        Column::Text("STATE"),
        Column::Text("MEDIUM"),
        Column::Number("TOTAL"),
        Column::Number("FREE"),
        Column::Number("ALLOCATED"),
        Column::Number("PENDING SCRUB"),
        Column::Text("PATH"),
    ];
    const NONE: &'static str = "no stores yet; add one: volctl store add NAME --path PATH --size SIZE";

    fn cells(&self) -> Vec<String> {
        vec![
            self.name.to_string(),
            self.zone.to_string(),
            word(&self.state),
            self.medium.clone(),
            size(self.total_bytes),
            size(self.free_bytes),
            size(self.allocated_bytes),
            size(self.pending_scrub_bytes),
            self.path.clone(),
        ]
    }
}

impl Human for Store {
    fn human(&self) -> String {
        facts(&[
            ("Name", Some(self.name.to_string())),
            ("Id", Some(self.id.clone())),
            ("Path", Some(self.path.clone())),
            ("Zone", Some(self.zone.to_string())),
            ("State", Some(word(&self.state))),
            ("Reason", self.reason.clone()),
            ("Replicas", Some(self.replicas.to_string())),
            (
                "Medium",
                Some(format!("{} ({})", self.medium, self.medium_reason)),
            ),
            ("Extent size", Some(size(self.extent_bytes))),
            ("Total", Some(size(self.total_bytes))),
            ("Free", Some(size(self.free_bytes))),
            ("Allocated", Some(size(self.allocated_bytes))),
            ("Pending scrub", Some(size(self.pending_scrub_bytes))),
        ])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn store(name: &str, state: StoreState, reason: Option<&str>) -> Store {
        Store {
            name: name.parse().unwrap(),
            id: "5f0c".into(),
            path: format!("/srv/{name}.store"),
            zone: "rack1".parse().unwrap(),
            state,
            reason: reason.map(Into::into),
            replicas: 2,
            medium: "in_place".into(),
            medium_reason: "ext4 on a disk".into(),
            extent_bytes: 4 << 20,
            total_bytes: 10 << 30,
            free_bytes: (3 << 30) + (1 << 29),
            pending_scrub_bytes: 0,
            allocated_bytes: (6 << 30) + (1 << 29),
        }
    }

    #[test]
    fn the_list_lines_up() {
        let list = List {
            items: vec![
                store("a", StoreState::Online, None),
                store("nvme-long", StoreState::Faulty, Some("a sync failed")),
            ],
        };
        let expected = "\
NAME       ZONE   STATE   MEDIUM     TOTAL     FREE  ALLOCATED  PENDING SCRUB  PATH
a          rack1  online  in_place  10 GiB  3.5 GiB    6.5 GiB            0 B  /srv/a.store
nvme-long  rack1  faulty  in_place  10 GiB  3.5 GiB    6.5 GiB            0 B  /srv/nvme-long.store";
        assert_eq!(list.human(), expected);
    }

    #[test]
    fn a_store_out_of_use_shows_its_reason() {
        let text = store("a", StoreState::Offline, Some("missing")).human();
        assert!(
            text.contains("State          offline\nReason         missing\n"),
            "{text}"
        );
        assert!(
            text.contains("Medium         in_place (ext4 on a disk)\n"),
            "{text}"
        );
        assert!(!store("a", StoreState::Online, None).human().contains("Reason"));
    }

    #[test]
    fn a_relative_path_is_completed_from_where_volctl_runs() {
        let expected = std::env::current_dir().unwrap().join("a.store");
        assert_eq!(absolute("a.store".into()).unwrap(), expected.to_str().unwrap());
        assert_eq!(absolute("/srv/a.store".into()).unwrap(), "/srv/a.store");
        assert!(absolute(String::new()).is_err());
    }
}
