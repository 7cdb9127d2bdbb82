//! `volctl`: the command line of vold.
//!
//! | file | job |
//! |---|---|
//! | `args` | the command line, checked |
//! | `client` | HTTP over the daemon's Unix socket |
//! | `failure`, `units`, `render` | refusals; sizes and times; tables and JSON |
//! | `store`, `customer`, `vm`, `volume`, `attachment`, `scrub`, `destroy`, `audit`, `status` | one noun each: its verbs, its table |
//!
//! Exit status: 0 done, 1 refused or failed (one line on standard error), 2 wrong usage. With `--output json`, standard
//! output is exactly one JSON document in each of these cases, `{"error":{"code","message"}}` in the last two.
//!
//! It holds no policy: whether something is allowed, fits or exists is the daemon's to say.

mod args;
mod attachment;
mod audit;
mod client;
mod customer;
mod destroy;
mod failure;
#[cfg(test)]
mod fake;
mod render;
mod scrub;
mod status;
mod store;
mod tls;
mod units;
mod vm;
mod volume;

use std::ffi::OsString;
use std::process::ExitCode;

use clap::{CommandFactory, Parser};
use libvol::Kind;
use serde::Serialize;

use args::{Cli, Command, Format};
use client::Client;
use failure::Failure;
use render::Human;

/// What every command works with.
struct Session {
    client: Client,
    format: Format,
}

impl Session {
    /// Prints a result.
    fn show<T: Serialize + Human>(&self, value: &T) -> Result<(), Failure> {
        render::print(&render::document(self.format, value))
    }

    /// Prints the result of a command that has none but a line for people.
    fn done<T: Serialize>(&self, value: &T, line: &str) -> Result<(), Failure> {
        match self.format {
            Format::Table => render::print(line),
            Format::Json => render::print(&render::json(value)),
        }
    }
}

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return wrong_usage(&error),
    };
    let format = cli.global.output;
    match run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            render::note(&format!("volctl: {}", failure.message()));
            if format == Format::Json {
                // If standard output is gone too, the exit status still tells.
                let _ = render::print(&render::json(&failure.body()));
            }
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> Result<(), Failure> {
    if let Command::Completions { shell } = cli.command {
        return completions(shell);
    }
    let session = Session {
        client: Client::new(cli.global.api),
        format: cli.global.output,
    };
    if let Command::Tls(command) = &cli.command {
        return tls::run(&session, command);
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|e| {
            Failure::new(
                Kind::Internal,
                format!("cannot start: {e}; are there free file descriptors?"),
            )
        })?;
    runtime.block_on(async {
        match cli.command {
            Command::Store(command) => store::run(&session, command).await,
            Command::Customer(command) => customer::run(&session, command).await,
            Command::Vm(command) => vm::run(&session, command).await,
            Command::Volume(command) => volume::run(&session, command).await,
            Command::Attach(args) => attachment::attach(&session, args).await,
            Command::Detach(args) => attachment::detach(&session, args).await,
            Command::Attachment(command) => attachment::run(&session, command).await,
            Command::Scrub(command) => scrub::run(&session, command).await,
            Command::Destroy(command) => destroy::run(&session, command).await,
            Command::Audit(command) => audit::run(&session, command).await,
            Command::Status => status::status(&session).await,
            Command::Version => status::version(&session).await,
            Command::Completions { .. } | Command::Tls(_) => unreachable!("handled above, without a daemon"),
        }
    })
}

fn completions(shell: clap_complete::Shell) -> Result<(), Failure> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "volctl", &mut script);
    let script = String::from_utf8(script).expect("names and help texts are UTF-8");
    render::print(script.trim_end())
}

/// Prints help, the version, or what is wrong with the command line.
fn wrong_usage(error: &clap::Error) -> ExitCode {
    let _ = error.print();
    if error.exit_code() == 0 {
        return ExitCode::SUCCESS;
    }
    if json_wanted(std::env::args_os()) {
        let text = error.to_string();
        let text = text.strip_prefix("error: ").unwrap_or(&text);
        let first = text.split("\n\n").next().unwrap_or(text);
        let _ = render::print(&render::json(&Failure::new(Kind::Invalid, first).body()));
    }
    ExitCode::from(2)
}

/// Whether a command line that could not be understood asks for JSON.
fn json_wanted(arguments: impl Iterator<Item = OsString>) -> bool {
    let arguments: Vec<OsString> = arguments.skip(1).take_while(|a| a != "--").collect();
    let joined = arguments.iter().any(|a| a == "--output=json");
    joined
        || arguments
            .windows(2)
            .any(|pair| pair[0] == "--output" && pair[1] == "json")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_is_recognised_in_a_command_line_that_is_wrong_otherwise() {
        let wanted = |line: &str| json_wanted(line.split(' ').map(OsString::from));
        assert!(wanted("volctl --output json volume"));
        assert!(wanted("volctl volume --output=json"));
        assert!(!wanted("volctl volume json --output table"));
        assert!(!wanted("volctl volume -- --output json"));
    }
}
