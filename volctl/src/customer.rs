//! `volctl customer`: to whom VMs and volumes belong.

use clap::Subcommand;
use libvol::control::{Customer, CustomerCreate, List};
use libvol::ids::Name;

use crate::Session;
use crate::failure::Failure;
use crate::render::{Column, Human, Row, facts};
use crate::units::time;

/// What to do with customers.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Register a customer, with a master key of its own
    Create {
        /// Its name
        customer: Name,
    },
    /// All customers
    List,
    /// One customer
    Show {
        /// Its name
        customer: Name,
    },
}

/// Carries it out.
pub(crate) async fn run(session: &Session, command: Command) -> Result<(), Failure> {
    match command {
        Command::Create { customer } => {
            let body = CustomerCreate { name: customer };
            session.show(&session.client.post::<Customer>("/v1/customers", &body).await?)
        }
        Command::List => session.show(&session.client.get::<List<Customer>>("/v1/customers").await?),
        Command::Show { customer } => session.show(
            &session
                .client
                .get::<Customer>(&format!("/v1/customers/{customer}"))
                .await?,
        ),
    }
}

impl Row for Customer {
    const COLUMNS: &'static [Column] = &[
        Column::Text("NAME"),
        Column::Number("VMS"),
        Column::Number("VOLUMES"),
        Column::Text("CREATED"),
    ];
    const NONE: &'static str = "no customers yet; create one: volctl customer create CUSTOMER";

    fn cells(&self) -> Vec<String> {
        vec![
            self.name.to_string(),
            self.vms.to_string(),
            self.volumes.to_string(),
            time(self.created_unix_seconds),
        ]
    }
}

impl Human for Customer {
    fn human(&self) -> String {
        facts(&[
            ("Name", Some(self.name.to_string())),
            ("Id", Some(self.id.to_string())),
            ("VMs", Some(self.vms.to_string())),
            ("Volumes", Some(self.volumes.to_string())),
            ("Created", Some(time(self.created_unix_seconds))),
        ])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use libvol::ids::CustomerId;

    #[test]
    fn the_list_lines_up() {
        let customer = |name: &str, volumes| Customer {
            name: name.parse().unwrap(),
            id: CustomerId::NIL,
            created_unix_seconds: 951_782_400,
            vms: 1,
            volumes,
        };
        let list = List {
            items: vec![customer("acme", 9), customer("globex", 10)],
        };
        let expected = "\
NAME    VMS  VOLUMES  CREATED
acme      1        9  2000-02-29 00:00:00 UTC
globex    1       10  2000-02-29 00:00:00 UTC";
        assert_eq!(list.human(), expected);
    }
}
