//! The command line. Everything is checked here once (names, ids, sizes, addresses) and is typed from then on.

use clap::{Args, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;

use crate::client::Api;
use crate::{attachment, audit, customer, destroy, scrub, store, tls, vm, volume};

/// `volctl`: the command line of vold.
#[derive(Debug, Parser)]
#[command(
    name = "volctl",
    version,
    about = "Command line of vold, the block-storage daemon",
    max_term_width = 100
)]
#[command(arg_required_else_help = true, subcommand_required = true)]
#[command(after_help = "Exit status: 0 done, 1 refused or failed, 2 wrong usage.\n\
Sizes: bytes, or a whole number with K, M, G or T (powers of 1024), for example 10G.")]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// Options that go before or after any command.
#[derive(Debug, Args)]
pub(crate) struct Global {
    /// Where the daemon's API is: unix:PATH
    #[arg(long, global = true, env = "VOLD_API", value_name = "ADDRESS", value_parser = Api::parse)]
    #[arg(default_value = "unix:/var/lib/vold/api.sock")]
    pub(crate) api: Api,
    /// How to print the result
    #[arg(long, global = true, value_name = "FORMAT", value_enum, default_value_t = Format::Table)]
    pub(crate) output: Format,
}

/// How results are printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// For people
    Table,
    /// One JSON document with stable field names; refusals are {"error":{"code","message"}}
    Json,
}

/// The nouns.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Stores: the files and block devices that hold the volumes' extents
    #[command(subcommand)]
    Store(store::Command),
    /// Customers, to whom VMs and volumes belong
    #[command(subcommand)]
    Customer(customer::Command),
    /// Virtual machines, to which volumes are attached
    #[command(subcommand)]
    Vm(vm::Command),
    /// Volumes: encrypted, replicated disks
    #[command(subcommand)]
    Volume(volume::Command),
    /// Give a volume to a VM of the same customer; prints how to reach it, and the QEMU arguments
    Attach(attachment::AttachArgs),
    /// Take a volume from a VM; its connections end
    Detach(attachment::DetachArgs),
    /// Attachments: which volume is given to which VM
    #[command(subcommand)]
    Attachment(attachment::Command),
    /// Integrity scrub: verify everything that is stored, and repair what is damaged
    #[command(subcommand)]
    Scrub(scrub::Command),
    /// Destructions of deleted volumes
    #[command(subcommand)]
    Destroy(destroy::Command),
    /// The audit log: what was done, by whom, and what the daemon mended
    #[command(subcommand)]
    Audit(audit::Command),
    /// Certificates for NBD over TLS, from a small authority in files; no daemon is asked
    #[command(subcommand)]
    Tls(tls::Command),
    /// How the daemon and its stores are
    Status,
    /// Versions of volctl and of the daemon
    Version,
    /// Print a completion script, for example: volctl completions bash > /etc/bash_completion.d/volctl
    Completions {
        /// For which shell
        shell: Shell,
    },
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;
    use clap::error::ErrorKind;

    fn parse(line: &str) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(std::iter::once("volctl").chain(line.split_whitespace()))
    }

    #[test]
    fn the_command_tree_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_command_of_the_surface_is_understood() {
        for line in [
            "store add a --path /s/a --size 10G --zone rack1 --extent-size 8M --allow-buffered",
            "store add a --path /dev/x",
            "store list",
            "store show a",
            "store remove a",
            "customer create acme",
            "customer list",
            "customer show acme",
            "vm create vm1 --customer acme",
            "vm create vm1 --customer acme --uid 64055",
            "vm list",
            "vm show vm1",
            "vm remove vm1",
            "volume create acme/web --size 10G",
            "volume create acme/web --size 10G --replicas 3",
            "volume list",
            "volume show acme/web",
            "volume resize acme/web --size 20G",
            "volume delete acme/web",
            "volume delete acme/web --now",
            "attach acme/web --vm vm1",
            "attach acme/web --vm vm1 --via nbd --read-only",
            "attach acme/web --vm vm1 --via vhost-user",
            "detach acme/web --vm vm1",
            "attachment list",
            "scrub start",
            "scrub start acme/web",
            "scrub start acme/web --rate 100M",
            "scrub start --rate 1G",
            "scrub status",
            "destroy list",
            "destroy show 00000000-0000-4000-8000-000000000000",
            "destroy wait 00000000-0000-4000-8000-000000000000",
            "destroy wait 00000000-0000-4000-8000-000000000000 --timeout 30s",
            "status",
            "version",
            "completions bash",
            "--api unix:/tmp/a.sock --output json status",
            "status --output json --api unix:/tmp/a.sock",
        ] {
            if let Err(e) = parse(line) {
                panic!("{line}: {e}");
            }
        }
    }

    #[test]
    fn what_cannot_be_meant_is_wrong_usage_and_says_why() {
        for (line, why) in [
            ("volume create acme/web", "--size"),
            ("volume create acme --size 1G", "CUSTOMER/NAME"),
            ("volume create acme/web/x --size 1G", "not a valid name"),
            ("volume create acme/Web --size 1G", "not a valid name"),
            ("volume create acme/web --size 1.5G", "1536M"),
            ("volume create acme/web --size 10GB", "GiB"),
            ("volume create acme/web --size 99999999T", "2^64"),
            ("volume create acme/web --size 1G --replicas two", "invalid digit"),
            ("volume create acme/web --size 1G --replicas -1", "'-1'"),
            ("store add A --path /a --size 1G", "not a valid name"),
            ("store add a --size 1G", "--path"),
            ("vm create vm1", "--customer"),
            ("vm create vm1 --customer acme --uid root", "invalid digit"),
            ("attach acme/web", "--vm"),
            ("attach acme/web --vm vm1 --via iscsi", "vhost-user"),
            ("scrub start acme", "CUSTOMER/NAME"),
            ("scrub start --rate fast", "not a size"),
            ("destroy wait acme/web", "not an id"),
            (
                "destroy wait 00000000-0000-4000-8000-000000000000 --timeout 5",
                "30s",
            ),
            ("--api https://host:8443 status", "not in this build"),
            ("--api /var/lib/vold/api.sock status", "unix:PATH"),
            ("--output yaml status", "table"),
            ("frobnicate", "frobnicate"),
            ("completions tcsh", "bash"),
        ] {
            let error = parse(line).expect_err(line);
            assert_eq!(error.exit_code(), 2, "{line}");
            assert!(error.to_string().contains(why), "{line}: {error}");
        }
    }

    #[test]
    fn every_command_of_the_quick_tour_is_understood() {
        let readme = include_str!("../../README.md");
        let commands = readme.lines().filter_map(|line| line.strip_prefix("volctl "));
        let mut count = 0;
        for command in commands {
            let command = command.split('#').next().unwrap_or(command);
            let command = command.replace("VOLUME-ID", "00000000-0000-4000-8000-000000000000");
            if let Err(e) = parse(&command) {
                panic!("README.md: volctl {command}: {e}");
            }
            count += 1;
        }
        assert!(count >= 10, "the quick tour has shrunk to {count} commands");
    }

    #[test]
    fn no_command_at_all_shows_the_help() {
        assert_eq!(
            parse("").unwrap_err().kind(),
            ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand
        );
    }

    #[test]
    fn arguments_become_checked_values() {
        let cli = parse("volume create acme/web --size 64K --replicas 2").unwrap();
        let Command::Volume(volume::Command::Create {
            volume,
            size,
            replicas,
        }) = cli.command
        else {
            panic!("{:?}", cli.command);
        };
        assert_eq!(
            (volume.to_string().as_str(), size, replicas),
            ("acme/web", 65_536, Some(2))
        );
        assert_eq!(cli.global.output, Format::Table);
    }
}
