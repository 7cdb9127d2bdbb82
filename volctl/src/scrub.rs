//! `volctl scrub`: the integrity scrub.
//!
//! Starting returns at once; the pass is the daemon's, and goes on whatever becomes of `volctl`.

use clap::Subcommand;
use libvol::control::{List, Scrub, ScrubStart};
use libvol::ids::VolumePath;

use crate::Session;
use crate::failure::Failure;
use crate::render::{Column, Row, word};
use crate::units::{parse_size, size, time};

/// What to do about the integrity of what is stored.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Verify a volume now, attached or not: every block and checksum on every replica
    Start {
        /// Its full name (default: all volumes, one after the other)
        #[arg(value_name = "CUSTOMER/NAME")]
        volume: Option<VolumePath>,
        /// Bytes to verify a second at most, for example 100M (default: as fast as clients leave room for)
        #[arg(long, value_name = "SIZE", value_parser = parse_size)]
        rate: Option<u64>,
    },
    /// Where every volume's scrub stands, and what the last one found
    Status,
}

/// Carries it out.
pub(crate) async fn run(session: &Session, command: Command) -> Result<(), Failure> {
    let scrubs: List<Scrub> = match command {
        Command::Start { volume, rate } => {
            let body = ScrubStart {
                volume,
                bytes_per_second: rate,
            };
            session.client.post("/v1/scrubs", &body).await?
        }
        Command::Status => session.client.get("/v1/scrubs").await?,
    };
    session.show(&scrubs)
}

impl Row for Scrub {
    const COLUMNS: &'static [Column] = &[
        Column::Text("VOLUME"),
        Column::Text("STATE"),
        Column::Number("DONE"),
        Column::Number("OF"),
        Column::Number("HEALED BLOCKS"),
        Column::Number("HEALED CHECKSUMS"),
        Column::Number("LOST BLOCKS"),
        Column::Text("LAST FINISHED"),
        Column::Text("WAITS BECAUSE"),
    ];
    const NONE: &'static str = "no volumes yet, so there is nothing to verify";

    fn cells(&self) -> Vec<String> {
        let finished = self.last_finished_unix_seconds;
        vec![
            self.volume.to_string(),
            word(&self.state),
            size(self.bytes_done),
            size(self.bytes_total),
            self.healed_blocks.to_string(),
            self.healed_areas.to_string(),
            self.lost_blocks.to_string(),
            finished.map_or("never".into(), time),
            self.reason.clone().unwrap_or_else(|| "-".into()),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::render::Human;
    use libvol::control::ScrubState;

    #[test]
    fn the_list_lines_up() {
        let running = Scrub {
            volume: "acme/web".parse().unwrap(),
            state: ScrubState::Running,
            reason: None,
            pass: 2,
            bytes_done: 3 << 30,
            bytes_total: 20 << 30,
            bytes_per_second: None,
            started_unix_seconds: Some(951_782_400),
            last_finished_unix_seconds: Some(951_782_400),
            verified_bytes: 3 << 30,
            healed_blocks: 12,
            healed_areas: 1,
            lost_blocks: 0,
        };
        let never = Scrub {
            volume: "acme/db".parse().unwrap(),
            state: ScrubState::Idle,
            pass: 0,
            bytes_done: 0,
            bytes_total: 0,
            last_finished_unix_seconds: None,
            healed_blocks: 0,
            healed_areas: 0,
            ..running.clone()
        };
        let expected = "\
VOLUME    STATE     DONE      OF  HEALED BLOCKS  HEALED CHECKSUMS  LOST BLOCKS  LAST FINISHED            WAITS BECAUSE
acme/web  running  3 GiB  20 GiB             12                 1            0  2000-02-29 00:00:00 UTC  -
acme/db   idle       0 B     0 B              0                 0            0  never                    -";
        let items = vec![running, never];
        assert_eq!(List { items }.human(), expected);
    }
}
