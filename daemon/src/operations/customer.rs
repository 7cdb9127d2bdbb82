//! Customers.
//!
//! Create: master key first, then the record. A crash in between leaves one unused slot in the keystore and no
//! customer; the other order could leave a customer without a key.

use libvol::catalog::{CustomerRecord, VmRecord, VolumeRecord};
use libvol::control;
use libvol::ids::{CustomerId, Name};
use libvol::limits::CUSTOMERS_MAX;
use libvol::{Error, Result};

use super::{Operations, customer_named};
use crate::process::unix_seconds;

impl Operations {
    /// Makes a customer and its master key.
    ///
    /// # Errors
    /// `Exists`, `NoSpace`, and the key service's.
    pub(crate) async fn customer_create(
        &self,
        request: control::CustomerCreate,
    ) -> Result<control::Customer> {
        let name = request.name;
        self.look(|view| {
            if view.count::<CustomerRecord>()? >= CUSTOMERS_MAX {
                return Err(Error::no_space(format!(
                    "there are {CUSTOMERS_MAX} customers, the most one host may have"
                )));
            }
            match view.named::<CustomerRecord>(name.as_str())? {
                Some(_) => Err(Error::exists(format!(
                    "customer {:?} exists already; choose another name",
                    name.as_str()
                ))),
                None => Ok(()),
            }
        })?;
        let id = CustomerId::random();
        let cmk = self.keys.create_cmk(id).await?;
        let record = CustomerRecord {
            id,
            name,
            cmk,
            created_unix_seconds: unix_seconds(),
        };
        if let Err(e) = self.change(|tx| tx.insert(&record)) {
            if let Err(left) = self.keys.destroy_cmk(cmk).await {
                tracing::warn!(
                    "master key {cmk} of a customer that was not created stays in the keystore: {left}"
                );
            }
            return Err(e);
        }
        tracing::info!(customer = %record.name, "created");
        self.customer_show(&record.name)
    }

    /// All customers.
    ///
    /// # Errors
    /// The catalog's.
    pub(crate) fn customer_list(&self) -> Result<Vec<control::Customer>> {
        self.look(|view| {
            let (vms, volumes) = (view.all::<VmRecord>()?, view.all::<VolumeRecord>()?);
            let customers = view.all::<CustomerRecord>()?;
            Ok(customers.into_iter().map(|c| shown(c, &vms, &volumes)).collect())
        })
    }

    /// One customer.
    ///
    /// # Errors
    /// `NotFound`.
    pub(crate) fn customer_show(&self, name: &Name) -> Result<control::Customer> {
        self.look(|view| {
            let customer = customer_named(view, name)?;
            Ok(shown(customer, &view.all()?, &view.all()?))
        })
    }
}

fn shown(customer: CustomerRecord, vms: &[VmRecord], volumes: &[VolumeRecord]) -> control::Customer {
    control::Customer {
        vms: vms.iter().filter(|vm| vm.customer == customer.id).count(),
        volumes: volumes.iter().filter(|v| v.customer == customer.id).count(),
        name: customer.name,
        id: customer.id,
        created_unix_seconds: customer.created_unix_seconds,
    }
}
