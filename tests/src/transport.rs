//! The ways in which a volume gets to a guest: how it is attached, what the machine is started with, how the disk is taken
//! out of a running machine and put in again.

use std::path::Path;

use serde_json::{Value, json};

use crate::guest::{Guest, Machine, nbd_blockdev};
use crate::{Vold, tls};

/// How the volume gets to the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Via {
    /// QEMU's own NBD driver, over the attachment's socket.
    Nbd,
    /// QEMU's vhost-user-blk device.
    VhostUser,
    /// The guest kernel's own NBD client, over TLS: `nbd-client` connects it.
    KernelNbd,
}

impl Via {
    /// A daemon that can be reached in this way.
    pub fn daemon(self) -> Vold {
        match self {
            Via::Nbd | Via::VhostUser => Vold::start(),
            // (nbd-client knows nothing newer.)
            Via::KernelNbd => tls::daemon(&["--tls-1-2"]),
        }
    }

    /// Attaches `acme/vol` to `vm1`; gives what attach said.
    pub fn attach(self, vold: &Vold) -> Value {
        match self {
            Via::Nbd | Via::KernelNbd => vold.ctl("attach acme/vol --vm vm1"),
            Via::VhostUser => vold.ctl("attach acme/vol --vm vm1 --via vhost-user"),
        }
    }

    /// `acme/vol` on two replicas, attached to `vm1`, and what attach said.
    pub fn attached(self, size: &str) -> (Vold, Value) {
        let vold = self.daemon();
        vold.with_detached_volume(2, "256M", size);
        let attached = self.attach(&vold);
        (vold, attached)
    }

    /// A machine of `vm1` that has the volume and runs a script.
    pub fn machine(self, vold: &Vold, attached: &Value, script: &str) -> Machine {
        match self {
            Via::Nbd | Via::VhostUser => {
                Machine::running(&vold.path(""), script).with(&attached["qemu_args"])
            }
            Via::KernelNbd => {
                let certificate = tls::issued(vold, "acme", "vm1");
                nbd_client_machine(vold, attached, script, &certificate)
            }
        }
    }

    /// Takes the disk out of a running machine, which uses it no more. (A guest that connects by itself has disconnected by itself.)
    pub fn unplug(self, guest: &mut Guest, attached: &Value) {
        match self {
            Via::Nbd => {
                let names = Names::of(attached);
                remove_device(guest, &names.device);
                guest.qmp("blockdev-del", json!({"node-name": names.drive}));
                guest.qmp("blockdev-del", json!({"node-name": names.connection}));
            }
            Via::VhostUser => {
                remove_device(guest, &of_device(attached, "id="));
                guest.qmp("chardev-remove", json!({"id": of_device(attached, "chardev=")}));
            }
            Via::KernelNbd => {}
        }
    }

    /// Puts it into a running machine. (A guest that connects by itself does so when it goes on.)
    pub fn plug(self, guest: &mut Guest, attached: &Value) {
        let device = match self {
            Via::Nbd => {
                guest.qmp("blockdev-add", nbd_blockdev(attached, "again"));
                json!({"driver": "virtio-blk-pci", "drive": "again", "id": "again-disk"})
            }
            Via::VhostUser => {
                let address = json!({"type": "unix", "data": {"path": attached["socket"]}});
                let socket = json!({"addr": address, "server": false, "reconnect-ms": 100});
                let backend = json!({"type": "socket", "data": socket});
                guest.qmp("chardev-add", json!({"id": "again", "backend": backend}));
                json!({"driver": "vhost-user-blk-pci", "chardev": "again", "id": "again-disk"})
            }
            Via::KernelNbd => return,
        };
        guest.qmp("device_add", device);
    }
}

/// A machine whose kernel connects to an attachment, with the certificate in that directory.
///
/// # Panics
/// When the directory has no name.
pub fn nbd_client_machine(vold: &Vold, attached: &Value, script: &str, certificate: &Path) -> Machine {
    let name = certificate.file_name().expect("a directory has a name");
    Machine::running(&vold.path(""), script)
        .network()
        .parameter("transport", "nbd-client")
        .parameter("port", tls::port(attached))
        .parameter("export", "acme/vol")
        .parameter("certificate", name.display())
        .input(certificate)
}

fn remove_device(guest: &mut Guest, device: &str) {
    guest.qmp("device_del", json!({"id": device}));
    guest.event("DEVICE_DELETED", |data| data["device"] == device);
}

/// QEMU's arguments of an attachment.
///
/// # Panics
/// When it has none.
pub fn qemu_args(attached: &Value) -> Vec<&str> {
    let list = attached["qemu_args"].as_array().expect("a list of arguments");
    list.iter().map(|text| text.as_str().expect("texts")).collect()
}

/// An option of attach's `-device`.
fn of_device(attached: &Value, key: &str) -> String {
    let arguments = qemu_args(attached);
    let device = arguments
        .iter()
        .position(|word| *word == "-device")
        .expect("a device");
    let mut options = arguments[device + 1].split(',');
    let value = options.find_map(|option| option.strip_prefix(key));
    value.expect(key).to_owned()
}

/// QEMU's names from attach's arguments.
pub struct Names {
    /// The connection's node.
    pub connection: String,
    /// The node above it, which the device has as its drive.
    pub drive: String,
    /// The device.
    pub device: String,
}

impl Names {
    /// Of an NBD attachment.
    ///
    /// # Panics
    /// When one is missing.
    pub fn of(attached: &Value) -> Self {
        let arguments = qemu_args(attached);
        let find = |key: &str| {
            let mut words = arguments.iter().flat_map(|argument| argument.split(','));
            let value = words.find_map(|word| word.strip_prefix(key));
            value.expect(key).to_owned()
        };
        Self {
            connection: find("node-name="),
            drive: find("drive="),
            device: find("id="),
        }
    }
}
