//! Tenancy: who may attach, connect to, see and delete what. Pure functions over facts; no I/O, no clock, no catalog.
//!
//! I2: a data session belongs to one attachment (volume, customer, VM, epoch), and the VM's customer equals the
//! volume's. [`may_attach`] decides that when an attachment is made, [`may_connect`] again at every connect and at
//! every export look-up. Two audiences, two grades of candour: an operator is told why, a data client is not — to it a
//! foreign export and a missing one are the same.

use crate::ids::{CustomerId, Epoch, Name, VmId, VolumeId};

/// An operator's uid on every host.
const ROOT_UID: u32 = 0;

/// The facts an attach is judged by.
#[derive(Clone, Copy, Debug)]
pub struct AttachFacts {
    /// Whose volume it is.
    pub volume_customer: CustomerId,
    /// Whose VM it is.
    pub vm_customer: CustomerId,
    /// The VM.
    pub vm: VmId,
    /// The VM that has the volume now.
    pub attached_to: Option<VmId>,
    /// How many volumes the VM has.
    pub vm_attachments: usize,
    /// How many it may have.
    pub vm_attachments_max: usize,
}

/// What becomes of an attach.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AttachVerdict {
    /// A new attachment is made.
    Attach,
    /// The VM has it already: the same attachment is given.
    Same,
    /// Another VM of the same customer has it.
    HeldBy(VmId),
    /// The VM is not of the volume's customer. Who holds the volume is then nobody's business.
    Foreign,
    /// The VM has as many volumes as it may.
    Full,
}

/// Whether a VM may have a volume.
pub fn may_attach(facts: &AttachFacts) -> AttachVerdict {
    if facts.volume_customer != facts.vm_customer {
        return AttachVerdict::Foreign;
    }
    match facts.attached_to {
        Some(holder) if holder == facts.vm => AttachVerdict::Same,
        Some(holder) => AttachVerdict::HeldBy(holder),
        None if facts.vm_attachments >= facts.vm_attachments_max => AttachVerdict::Full,
        None => AttachVerdict::Attach,
    }
}

/// A VM as its certificate names it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct VmIdentity {
    /// Its customer.
    pub customer: Name,
    /// Its name.
    pub vm: Name,
}

impl VmIdentity {
    /// From the URI of a certificate's subject alternative name, `vold://CUSTOMER/VM`; `None` for any other.
    pub fn from_uri(uri: &str) -> Option<Self> {
        let (customer, vm) = uri.strip_prefix("vold://")?.split_once('/')?;
        Some(Self {
            customer: customer.parse().ok()?,
            vm: vm.parse().ok()?,
        })
    }
}

impl std::fmt::Display for VmIdentity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "vold://{}/{}", self.customer, self.vm)
    }
}

/// Who connects, as the transport vouches for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Peer {
    /// A process of that uid, over the attachment's Unix socket.
    Uid(u32),
    /// Whoever has the key of that VM's certificate, over TLS.
    Vm(VmIdentity),
}

/// An attachment, as far as its sessions are concerned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AttachmentFacts {
    /// The volume.
    pub volume: VolumeId,
    /// Whose volume it is.
    pub volume_customer: CustomerId,
    /// Whose VM it is.
    pub vm_customer: CustomerId,
    /// Unix uid of the VM's QEMU.
    pub vm_uid: u32,
    /// The VM as its certificate has to name it.
    pub vm: VmIdentity,
    /// The attachment epoch it was made in.
    pub epoch: Epoch,
}

/// Why a session is not let in. For the log; the peer learns nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConnectRefusal {
    /// The peer runs as another uid than the VM's.
    WrongUid,
    /// The peer's certificate names another VM.
    WrongVm,
    /// The volume has been detached, or attached anew, since.
    Superseded,
    /// VM and volume are of different customers.
    Foreign,
}

impl std::fmt::Display for ConnectRefusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            ConnectRefusal::WrongUid => "the peer's uid is not the VM's",
            ConnectRefusal::WrongVm => "the peer's certificate names another VM",
            ConnectRefusal::Superseded => "the attachment has been superseded",
            ConnectRefusal::Foreign => "the VM is not of the volume's customer",
        })
    }
}

/// Whether a peer may use an attachment, given the volume's attachment epoch now. Root is no exception: whoever operates
/// the host places volumes and does not read them.
///
/// # Errors
/// Why not.
pub fn may_connect(
    attachment: &AttachmentFacts,
    peer: &Peer,
    current_epoch: Epoch,
) -> Result<(), ConnectRefusal> {
    if attachment.volume_customer != attachment.vm_customer {
        return Err(ConnectRefusal::Foreign);
    }
    if attachment.epoch != current_epoch {
        return Err(ConnectRefusal::Superseded);
    }
    match peer {
        Peer::Uid(uid) if *uid != attachment.vm_uid => Err(ConnectRefusal::WrongUid),
        Peer::Vm(vm) if *vm != attachment.vm => Err(ConnectRefusal::WrongVm),
        Peer::Uid(_) | Peer::Vm(_) => Ok(()),
    }
}

/// Which export names a session of `attachment` finds: its own volume's, and the empty (default) one. Everything else,
/// foreign or missing, is not there.
pub fn may_find(
    attachment: &AttachmentFacts,
    own_name: &str,
    asked: &str,
    peer: &Peer,
    current_epoch: Epoch,
) -> bool {
    (asked.is_empty() || asked == own_name) && may_connect(attachment, peer, current_epoch).is_ok()
}

/// Whether a caller of the API's Unix socket is an operator: root, or who runs the daemon.
pub fn is_operator(caller_uid: u32, daemon_uid: u32) -> bool {
    caller_uid == ROOT_UID || caller_uid == daemon_uid
}

/// Whether a volume may be destroyed now: only when no VM has it.
///
/// # Errors
/// The VM that has it.
pub fn may_destroy(attached_to: Option<VmId>) -> Result<(), VmId> {
    attached_to.map_or(Ok(()), Err)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_volume_is_attached_only_within_its_customer_and_to_one_vm_at_a_time() {
        let (acme, globex) = (CustomerId::random(), CustomerId::random());
        let (vm, other) = (VmId::random(), VmId::random());
        use AttachVerdict::*;
        let table = [
            // vm's customer, held by, volumes it has → verdict
            (acme, None, 0, Attach),
            (acme, None, 63, Attach),
            (acme, None, 64, Full),
            (acme, Some(vm), 1, Same),
            (acme, Some(vm), 64, Same),
            (acme, Some(other), 0, HeldBy(other)),
            (globex, None, 0, Foreign),
            (globex, Some(other), 0, Foreign),
            (globex, Some(vm), 0, Foreign),
            (globex, None, 64, Foreign),
        ];
        for (vm_customer, attached_to, vm_attachments, verdict) in table {
            let facts = AttachFacts {
                volume_customer: acme,
                vm_customer,
                vm,
                attached_to,
                vm_attachments,
                vm_attachments_max: 64,
            };
            assert_eq!(may_attach(&facts), verdict, "{facts:?}");
        }
    }

    #[test]
    fn a_session_needs_the_vms_own_uid_the_current_epoch_and_one_customer() {
        let (acme, globex) = (CustomerId::random(), CustomerId::random());
        use ConnectRefusal::*;
        let table = [
            // vm's customer, peer uid, epoch now → verdict
            (acme, 1000, 7, Ok(())),
            (acme, 0, 7, Err(WrongUid)),
            (acme, 1001, 7, Err(WrongUid)),
            (acme, u32::MAX, 7, Err(WrongUid)),
            (acme, 1000, 8, Err(Superseded)),
            (acme, 1000, 6, Err(Superseded)),
            (acme, 0, 8, Err(Superseded)),
            (globex, 1000, 7, Err(Foreign)),
            (globex, 0, 7, Err(Foreign)),
            (globex, 1001, 9, Err(Foreign)),
        ];
        for (vm_customer, uid, now, verdict) in table {
            let facts = AttachmentFacts {
                volume: VolumeId::random(),
                volume_customer: acme,
                vm_customer,
                vm_uid: 1000,
                vm: identity("vold://acme/vm1"),
                epoch: Epoch(7),
            };
            let uid = &Peer::Uid(uid);
            assert_eq!(may_connect(&facts, uid, Epoch(now)), verdict, "{uid:?} {now}");
            let may = verdict.is_ok();
            assert_eq!(may_find(&facts, "acme/web", "acme/web", uid, Epoch(now)), may);
            assert_eq!(may_find(&facts, "acme/web", "", uid, Epoch(now)), may);
            for unknown in ["acme/db", "globex/web", "acme/web/", "Acme/web", "acme/we", "\0"] {
                assert!(
                    !may_find(&facts, "acme/web", unknown, uid, Epoch(now)),
                    "{unknown}"
                );
            }
        }
    }

    fn identity(uri: &str) -> VmIdentity {
        VmIdentity::from_uri(uri).expect(uri)
    }

    #[test]
    fn a_certificate_names_one_vm_of_one_customer_and_gets_no_further() {
        let acme = CustomerId::random();
        let facts = AttachmentFacts {
            volume: VolumeId::random(),
            volume_customer: acme,
            vm_customer: acme,
            vm_uid: 1000,
            vm: identity("vold://acme/vm1"),
            epoch: Epoch(7),
        };
        use ConnectRefusal::*;
        for (uri, now, verdict) in [
            ("vold://acme/vm1", 7, Ok(())),
            ("vold://acme/vm1", 8, Err(Superseded)),
            ("vold://acme/vm2", 7, Err(WrongVm)),
            ("vold://globex/vm1", 7, Err(WrongVm)),
        ] {
            let peer = Peer::Vm(identity(uri));
            assert_eq!(may_connect(&facts, &peer, Epoch(now)), verdict, "{uri} {now}");
        }
        for bad in [
            "",
            "vold://",
            "vold://acme",
            "vold://acme/",
            "vold:///vm1",
            "vold://acme/vm1/",
            "vold://acme/vm1/x",
            "vold://acme/vm1?x",
            "VOLD://acme/vm1",
            "vold://Acme/vm1",
            "vold://acme/vm1 ",
            "vold://acme%2fvm1",
            "http://acme/vm1",
            "vold://acme/vm1\0",
        ] {
            assert_eq!(VmIdentity::from_uri(bad), None, "{bad:?}");
        }
        assert_eq!(identity("vold://acme/vm1").to_string(), "vold://acme/vm1");
    }

    #[test]
    fn the_api_is_for_root_and_the_daemons_own_uid() {
        for (caller, daemon, may) in [
            (0, 0, true),
            (0, 990, true),
            (990, 990, true),
            (1000, 990, false),
            (1000, 0, false),
        ] {
            assert_eq!(is_operator(caller, daemon), may, "{caller} {daemon}");
        }
    }

    #[test]
    fn an_attached_volume_is_not_destroyed() {
        let vm = VmId::random();
        assert_eq!(may_destroy(None), Ok(()));
        assert_eq!(may_destroy(Some(vm)), Err(vm));
    }
}
