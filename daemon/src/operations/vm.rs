//! VMs: a name on this host, whose it is, and the uid its process runs as. One record each; a change is one transaction.

use std::collections::BTreeMap;

use libvol::catalog::{AttachmentRecord, CustomerRecord, View, VmRecord, VolumeRecord};
use libvol::control;
use libvol::ids::{Name, VmId, VolumePath};
use libvol::limits::VMS_PER_CUSTOMER;
use libvol::{Error, Result};

use super::{Operations, customer_named, vm_named};
use crate::process::unix_seconds;

impl Operations {
    /// Makes a VM; without a uid it gets the caller's.
    ///
    /// # Errors
    /// `Exists`, `NotFound` (customer), `NoSpace`.
    pub(crate) fn vm_create(&self, request: control::VmCreate, caller_uid: u32) -> Result<control::Vm> {
        let record = self.change(|tx| {
            let customer = customer_named(tx, &request.customer)?;
            let mine = tx
                .all::<VmRecord>()?
                .iter()
                .filter(|vm| vm.customer == customer.id)
                .count();
            if mine >= VMS_PER_CUSTOMER {
                return Err(Error::no_space(format!(
                    "customer {:?} has {VMS_PER_CUSTOMER} VMs, the most one may have",
                    request.customer.as_str()
                )));
            }
            let record = VmRecord {
                id: VmId::random(),
                name: request.name,
                customer: customer.id,
                uid: request.uid.unwrap_or(caller_uid),
                created_unix_seconds: unix_seconds(),
            };
            tx.insert(&record)?;
            Ok(record)
        })?;
        tracing::info!(vm = %record.name, customer = %request.customer, uid = record.uid, "created");
        self.look(|view| shown(view, record, &mut BTreeMap::new()))
    }

    /// All VMs.
    ///
    /// # Errors
    /// The catalog's.
    pub(crate) fn vm_list(&self) -> Result<Vec<control::Vm>> {
        self.look(|view| {
            let mut by_vm = volumes_by_vm(view)?;
            let vms = view.all::<VmRecord>()?;
            vms.into_iter().map(|vm| shown(view, vm, &mut by_vm)).collect()
        })
    }

    /// One VM.
    ///
    /// # Errors
    /// `NotFound`.
    pub(crate) fn vm_show(&self, name: &Name) -> Result<control::Vm> {
        self.look(|view| shown(view, vm_named(view, name)?, &mut volumes_by_vm(view)?))
    }

    /// Removes a VM that has no volumes.
    ///
    /// # Errors
    /// `NotFound`; `Busy` naming a volume it has.
    pub(crate) fn vm_remove(&self, name: &Name) -> Result<()> {
        self.change(|tx| {
            let vm = vm_named(tx, name)?;
            if let Some(path) = volumes_by_vm(tx)?.get(&vm.id).and_then(|paths| paths.first()) {
                return Err(Error::busy(format!(
                    "VM {:?} has volume {path}; detach it first: volctl detach {path} --vm {name}",
                    name.as_str()
                )));
            }
            tx.remove::<VmRecord>(vm.id)
        })?;
        tracing::info!(vm = %name, "removed");
        Ok(())
    }
}

/// Which volumes VMs have.
fn volumes_by_vm(view: &View<'_>) -> Result<BTreeMap<VmId, Vec<VolumePath>>> {
    let mut by_vm: BTreeMap<VmId, Vec<VolumePath>> = BTreeMap::new();
    for attachment in view.all::<AttachmentRecord>()? {
        if let Some(volume) = view.get::<VolumeRecord>(attachment.volume)? {
            by_vm.entry(attachment.vm).or_default().push(volume.path);
        }
    }
    by_vm.values_mut().for_each(|paths| paths.sort());
    Ok(by_vm)
}

fn shown(view: &View<'_>, vm: VmRecord, by_vm: &mut BTreeMap<VmId, Vec<VolumePath>>) -> Result<control::Vm> {
    let customer = view.get::<CustomerRecord>(vm.customer)?.ok_or_else(|| {
        Error::damaged(format!(
            "VM {:?}: its customer is not in the catalog",
            vm.name.as_str()
        ))
    })?;
    Ok(control::Vm {
        volumes: by_vm.remove(&vm.id).unwrap_or_default(),
        name: vm.name,
        id: vm.id,
        customer: customer.name,
        uid: vm.uid,
    })
}
