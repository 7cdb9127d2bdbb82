//! `volctl destroy`: watching the destruction of deleted volumes.
//!
//! `wait` asks again until the daemon says *destroyed*. Its progress goes to standard error (a bar on a terminal, a
//! plain line for every step and tenth otherwise), its result to standard output, so that `--output json` stays one
//! document. The job is the daemon's: stopping `wait` stops nothing.

use std::io::IsTerminal;
use std::time::Duration;

use clap::Subcommand;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use libvol::Kind;
use libvol::control::{Destroy, DestroyState, DestroyStep, DestroyStore, List};
use libvol::ids::VolumeId;
use tokio::time::Instant;

use crate::Session;
use crate::failure::Failure;
use crate::render::{Column, Human, Row, facts, note, rows, word};
use crate::units::{parse_duration, size, time};

/// Between two questions: short beside any destruction, long beside one question.
const POLL: Duration = Duration::from_millis(200);

/// What to do with destructions.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// All destructions, finished ones too
    List,
    /// One destruction, store by store
    Show {
        /// The volume's id, as `volume delete` printed it
        volume_id: VolumeId,
    },
    /// Wait until every replica is overwritten, verified and free
    Wait {
        /// The volume's id, as `volume delete` printed it
        volume_id: VolumeId,
        /// Give up waiting (the destruction goes on) after this time, for example 30s or 12h
        #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
        timeout: Option<Duration>,
    },
}

/// Carries it out.
pub(crate) async fn run(session: &Session, command: Command) -> Result<(), Failure> {
    match command {
        Command::List => session.show(&session.client.get::<List<Destroy>>("/v1/destroys").await?),
        Command::Show { volume_id } => session.show(&ask(session, volume_id).await?),
        Command::Wait { volume_id, timeout } => {
            let mut progress = Progress::new(std::io::stderr().is_terminal());
            let destroyed = wait(session, volume_id, timeout, |destroy| progress.report(destroy)).await;
            progress.end();
            session.show(&destroyed?)
        }
    }
}

async fn ask(session: &Session, volume: VolumeId) -> Result<Destroy, Failure> {
    session.client.get(&format!("/v1/destroys/{volume}")).await
}

/// Asks until it is destroyed; `report` sees every answer.
async fn wait(
    session: &Session,
    volume: VolumeId,
    timeout: Option<Duration>,
    mut report: impl FnMut(&Destroy),
) -> Result<Destroy, Failure> {
    let deadline = timeout.map(|timeout| Instant::now() + timeout);
    loop {
        let destroy = ask(session, volume).await?;
        report(&destroy);
        if destroy.state == DestroyState::Destroyed {
            return Ok(destroy);
        }
        if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
            let text = format!(
                "volume \"{}\" ({volume}) is not destroyed yet, {} % done{}; the daemon goes on with it: wait again",
                destroy.volume,
                percent(&destroy),
                away(&destroy)
            );
            return Err(Failure::new(Kind::Busy, text));
        }
        let next = Instant::now() + POLL;
        tokio::time::sleep_until(deadline.map_or(next, |deadline| deadline.min(next))).await;
    }
}

/// Bytes done and to do, over all stores.
fn bytes(destroy: &Destroy) -> (u64, u64) {
    let sum = |part: fn(&DestroyStore) -> u64| destroy.stores.iter().map(part).fold(0, u64::saturating_add);
    let total = sum(|store| store.bytes_total);
    (sum(|store| store.bytes_done).min(total), total)
}

/// Whole percent done; 100 only when it is destroyed.
fn percent(destroy: &Destroy) -> u64 {
    if destroy.state == DestroyState::Destroyed {
        return 100;
    }
    match bytes(destroy) {
        (_, 0) => 0,
        (done, total) => ((u128::from(done) * 100 / u128::from(total)) as u64).min(99),
    }
}

/// Which stores it waits for, if any.
fn away(destroy: &Destroy) -> String {
    let names: Vec<String> = destroy
        .stores
        .iter()
        .filter(|store| store.state == DestroyStep::Away)
        .map(|store| format!("{:?}", store.store))
        .collect();
    if names.is_empty() {
        return String::new();
    }
    format!(", waiting for the return of store {}", names.join(", "))
}

/// Where it stands, in a few words: `a scrubbing, b away`.
fn steps(destroy: &Destroy) -> String {
    let each: Vec<String> = destroy
        .stores
        .iter()
        .map(|s| format!("{} {}", s.store, word(&s.state)))
        .collect();
    each.join(", ")
}

/// Progress on standard error.
enum Progress {
    Bar(ProgressBar),
    Lines { last: Option<String> },
}

impl Progress {
    fn new(terminal: bool) -> Self {
        if !terminal {
            return Progress::Lines { last: None };
        }
        let style = ProgressStyle::with_template("{bar:30} {wide_msg}").expect("the template is valid");
        let bar = ProgressBar::with_draw_target(Some(100), ProgressDrawTarget::stderr()).with_style(style);
        Progress::Bar(bar)
    }

    fn report(&mut self, destroy: &Destroy) {
        match self {
            Progress::Bar(bar) => {
                bar.set_message(line(destroy));
                bar.set_position(percent(destroy));
            }
            Progress::Lines { last } => {
                if let Some(line) = next_line(last, destroy) {
                    note(&line);
                }
            }
        }
    }

    fn end(&self) {
        if let Progress::Bar(bar) = self {
            bar.abandon();
        }
    }
}

/// The line to print, if a step or a tenth has passed since `last`.
fn next_line(last: &mut Option<String>, destroy: &Destroy) -> Option<String> {
    let mark = format!("{} {}", percent(destroy) / 10, steps(destroy));
    if last.as_ref() == Some(&mark) {
        return None;
    }
    *last = Some(mark);
    Some(line(destroy))
}

/// Progress in one line.
fn line(destroy: &Destroy) -> String {
    let (done, total) = bytes(destroy);
    format!(
        "{:3} %  {} of {}  {}",
        percent(destroy),
        size(done),
        size(total),
        steps(destroy)
    )
}

impl Row for Destroy {
    const COLUMNS: &'static [Column] = &[
        Column::Text("VOLUME ID"),
        Column::Text("VOLUME"),
        Column::Text("STATE"),
        Column::Number("DONE"),
        Column::Text("STARTED"),
        Column::Text("STORES"),
    ];
    const NONE: &'static str = "no volume has been destroyed";

    fn cells(&self) -> Vec<String> {
        vec![
            self.volume_id.to_string(),
            self.volume.to_string(),
            word(&self.state),
            format!("{} %", percent(self)),
            time(self.started_unix_seconds),
            steps(self),
        ]
    }
}

impl Row for DestroyStore {
    const COLUMNS: &'static [Column] = &[
        Column::Text("STORE"),
        Column::Text("STATE"),
        Column::Number("EXTENTS"),
        Column::Number("DONE"),
        Column::Number("TOTAL"),
    ];
    const NONE: &'static str = "it was on no store";

    fn cells(&self) -> Vec<String> {
        vec![
            self.store.to_string(),
            word(&self.state),
            self.extents.to_string(),
            size(self.bytes_done),
            size(self.bytes_total),
        ]
    }
}

impl Human for Destroy {
    fn human(&self) -> String {
        let facts = facts(&[
            ("Volume", Some(self.volume.to_string())),
            ("Id", Some(self.volume_id.to_string())),
            ("State", Some(word(&self.state))),
            ("Done", Some(format!("{} %", percent(self)))),
            ("Started", Some(time(self.started_unix_seconds))),
            ("Finished", self.finished_unix_seconds.map(time)),
        ]);
        if self.stores.is_empty() {
            return facts;
        }
        format!("{facts}\n\n{}", rows(&self.stores))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::Format;
    use crate::client::{Api, Client};
    use crate::fake::FakeDaemon;

    fn destroy(state: DestroyState, a: (DestroyStep, u64), b: (DestroyStep, u64)) -> Destroy {
        let store = |name: &str, (state, bytes_done): (DestroyStep, u64)| DestroyStore {
            store: name.parse().unwrap(),
            state,
            extents: 25,
            bytes_done,
            bytes_total: 100 << 20,
        };
        Destroy {
            volume_id: VolumeId::NIL,
            volume: "acme/web".parse().unwrap(),
            state,
            stores: vec![store("a", a), store("b", b)],
            started_unix_seconds: 951_782_400,
            finished_unix_seconds: (state == DestroyState::Destroyed).then_some(951_782_402),
        }
    }

    fn at_work(done: u64, b: DestroyStep) -> Destroy {
        destroy(DestroyState::Destroying, (DestroyStep::Scrubbing, done), (b, 0))
    }

    fn destroyed() -> Destroy {
        let done = (DestroyStep::Done, 100 << 20);
        destroy(DestroyState::Destroyed, done, done)
    }

    fn session(fake: &FakeDaemon) -> Session {
        Session {
            client: Client::new(Api::parse(&fake.api()).unwrap()),
            format: Format::Json,
        }
    }

    fn run<T>(work: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap()
            .block_on(work)
    }

    #[test]
    fn waiting_ends_with_the_first_answer_that_says_destroyed() {
        let answers: Vec<String> = [
            at_work(0, DestroyStep::Waiting),
            at_work(50 << 20, DestroyStep::Keys),
            destroyed(),
        ]
        .iter()
        .map(|d| serde_json::to_string(d).unwrap())
        .collect();
        let answers: Vec<(u16, &str)> = answers.iter().map(|a| (200, a.as_str())).collect();
        let fake = FakeDaemon::answering_in_turn(&answers);
        let mut seen = Vec::new();
        let end = run(wait(&session(&fake), VolumeId::NIL, None, |d| {
            seen.push(percent(d))
        }))
        .unwrap();
        assert_eq!(end.state, DestroyState::Destroyed);
        assert_eq!(seen, [0, 25, 100]);
        assert!(
            fake.request()
                .starts_with("GET /v1/destroys/00000000-0000-0000-0000-000000000000 ")
        );
    }

    #[test]
    fn a_wait_that_times_out_names_the_store_it_waits_for() {
        let answer = serde_json::to_string(&at_work(50 << 20, DestroyStep::Away)).unwrap();
        let fake = FakeDaemon::answering(200, &answer);
        let timeout = Some(Duration::from_millis(1));
        let failure = run(wait(&session(&fake), VolumeId::NIL, timeout, |_| ())).unwrap_err();
        assert_eq!(failure.code(), "busy");
        let expected =
            "25 % done, waiting for the return of store \"b\"; the daemon goes on with it: wait again";
        assert!(failure.message().ends_with(expected), "{failure:?}");
    }

    #[test]
    fn an_unknown_destruction_ends_the_wait() {
        let fake = FakeDaemon::answering(
            404,
            r#"{"error":{"code":"not_found","message":"no such destruction"}}"#,
        );
        let failure = run(wait(&session(&fake), VolumeId::NIL, None, |_| ())).unwrap_err();
        assert_eq!(failure.code(), "not_found");
    }

    #[test]
    fn a_hundred_percent_means_destroyed_and_nothing_less() {
        let all_bytes = (DestroyStep::Scrubbing, 100 << 20);
        assert_eq!(
            percent(&destroy(DestroyState::Destroying, all_bytes, all_bytes)),
            99
        );
        assert_eq!(percent(&destroyed()), 100);
        let mut empty = at_work(0, DestroyStep::Keys);
        empty.stores.clear();
        assert_eq!(percent(&empty), 0);
        empty.state = DestroyState::Destroyed;
        assert_eq!(percent(&empty), 100);
    }

    #[test]
    fn plain_progress_is_a_line_for_every_step_and_tenth_not_for_every_answer() {
        let mut last = None;
        let first = next_line(&mut last, &at_work(0, DestroyStep::Waiting));
        assert_eq!(
            first.as_deref(),
            Some("  0 %  0 B of 200 MiB  a scrubbing, b waiting")
        );
        assert_eq!(next_line(&mut last, &at_work(1, DestroyStep::Waiting)), None);
        assert!(next_line(&mut last, &at_work(1, DestroyStep::Away)).is_some());
        assert!(next_line(&mut last, &at_work(20 << 20, DestroyStep::Away)).is_some());
        assert!(
            next_line(&mut last, &destroyed())
                .unwrap()
                .starts_with("100 %  200 MiB of 200 MiB")
        );
    }

    #[test]
    fn counters_that_make_no_sense_do_not_overflow() {
        let mut odd = at_work(u64::MAX, DestroyStep::Scrubbing);
        for store in &mut odd.stores {
            store.bytes_done = u64::MAX;
            store.bytes_total = u64::MAX;
        }
        assert_eq!(percent(&odd), 99);
    }

    #[test]
    fn one_destruction_is_shown_store_by_store() {
        let expected = "\
Volume    acme/web
Id        00000000-0000-0000-0000-000000000000
State     destroyed
Done      100 %
Started   2000-02-29 00:00:00 UTC
Finished  2000-02-29 00:00:02 UTC

STORE  STATE  EXTENTS     DONE    TOTAL
a      done        25  100 MiB  100 MiB
b      done        25  100 MiB  100 MiB";
        assert_eq!(destroyed().human(), expected);
    }
}
