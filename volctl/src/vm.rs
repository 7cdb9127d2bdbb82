//! `volctl vm`: the virtual machines that volumes are attached to.

use clap::Subcommand;
use libvol::control::{Done, List, Vm, VmCreate};
use libvol::ids::Name;

use crate::Session;
use crate::failure::Failure;
use crate::render::{Column, Human, Row, facts};

/// What to do with VMs.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Register a VM
    Create {
        /// Its name, unique on this host
        vm: Name,
        /// Whose it is
        #[arg(long, value_name = "CUSTOMER")]
        customer: Name,
        /// Unix user id its QEMU runs as: only this user may connect (default: whoever runs this command)
        #[arg(long, value_name = "UID")]
        uid: Option<u32>,
    },
    /// All VMs
    List,
    /// One VM with the volumes attached to it
    Show {
        /// Its name
        vm: Name,
    },
    /// Forget a VM that has no volume attached
    Remove {
        /// Its name
        vm: Name,
    },
}

/// Carries it out.
pub(crate) async fn run(session: &Session, command: Command) -> Result<(), Failure> {
    match command {
        Command::Create { vm, customer, uid } => {
            let body = VmCreate {
                name: vm,
                customer,
                uid,
            };
            session.show(&session.client.post::<Vm>("/v1/vms", &body).await?)
        }
        Command::List => session.show(&session.client.get::<List<Vm>>("/v1/vms").await?),
        Command::Show { vm } => session.show(&session.client.get::<Vm>(&format!("/v1/vms/{vm}")).await?),
        Command::Remove { vm } => {
            let done: Done = session.client.delete(&format!("/v1/vms/{vm}")).await?;
            session.done(&done, &format!("VM \"{vm}\" removed"))
        }
    }
}

/// Its volumes, or a dash.
fn volumes(vm: &Vm) -> String {
    if vm.volumes.is_empty() {
        return "-".into();
    }
    let names: Vec<String> = vm.volumes.iter().map(ToString::to_string).collect();
    names.join(", ")
}

impl Row for Vm {
    const COLUMNS: &'static [Column] = &[
        Column::Text("NAME"),
        Column::Text("CUSTOMER"),
        Column::Number("UID"),
        Column::Text("VOLUMES"),
    ];
    const NONE: &'static str = "no VMs yet; create one: volctl vm create VM --customer CUSTOMER";

    fn cells(&self) -> Vec<String> {
        vec![
            self.name.to_string(),
            self.customer.to_string(),
            self.uid.to_string(),
            volumes(self),
        ]
    }
}

impl Human for Vm {
    fn human(&self) -> String {
        facts(&[
            ("Name", Some(self.name.to_string())),
            ("Id", Some(self.id.to_string())),
            ("Customer", Some(self.customer.to_string())),
            ("Uid", Some(self.uid.to_string())),
            ("Volumes", Some(volumes(self))),
        ])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use libvol::ids::VmId;

    #[test]
    fn the_list_shows_attached_volumes_and_a_dash_for_none() {
        let vm = |name: &str, uid, volumes: &[&str]| Vm {
            name: name.parse().unwrap(),
            id: VmId::NIL,
            customer: "acme".parse().unwrap(),
            uid,
            volumes: volumes.iter().map(|v| v.parse().unwrap()).collect(),
        };
        let list = List {
            items: vec![vm("vm1", 0, &["acme/web", "acme/db"]), vm("vm2", 64_055, &[])],
        };
        let expected = "\
NAME  CUSTOMER    UID  VOLUMES
vm1   acme          0  acme/web, acme/db
vm2   acme      64055  -";
        assert_eq!(list.human(), expected);
    }
}
