//! Where a VM that comes over TLS finds its volumes, on whichever shard they live; and how many may come.
//!
//! A VM sees what it has attached, and nothing else: names are looked up among its own only, so that a foreign name and one
//! that does not exist take the same way and the same time. The book is kept by the doors, which open and close with the
//! attachments; who asks a door is judged by it again.

use std::collections::{BTreeMap, HashMap};
use std::rc::Rc;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use libvol::ids::{Name, VolumeId};
use libvol::limits::{NBD_CONNECTIONS_MAX, NBD_CONNECTIONS_PER_CUSTOMER, NBD_STRANGERS_MAX};
use libvol::runtime::Remote;
use libvol::tenant::VmIdentity;

use super::{Registry, registry_here};
use crate::nbd::{Exports, Lookup, Moving};

/// See the module's text.
#[derive(Default)]
pub(crate) struct Switchboard(Mutex<Book>);

#[derive(Default)]
struct Book {
    /// Every VM's open doors, by export name.
    doors: HashMap<VmIdentity, BTreeMap<String, VolumeId>>,
    /// The shards' threads.
    shards: Vec<Remote>,
    strangers: usize,
    guests: usize,
    by_customer: HashMap<Name, usize>,
}

/// A VM's connection on its way to a door.
pub(crate) struct Guest {
    /// The connection.
    pub(crate) moving: Moving,
    /// Whose it is.
    pub(crate) identity: VmIdentity,
    /// Its place among the connections.
    pub(crate) ticket: Ticket,
}

/// A place among the connections over TCP, given back on drop.
pub(crate) struct Ticket {
    switchboard: Arc<Switchboard>,
    customer: Option<Name>,
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let mut book = self.switchboard.book();
        match &self.customer {
            None => book.strangers -= 1,
            Some(customer) => {
                book.guests -= 1;
                if let Some(count) = book.by_customer.get_mut(customer) {
                    *count -= 1;
                    if *count == 0 {
                        book.by_customer.remove(customer);
                    }
                }
            }
        }
    }
}

impl Switchboard {
    fn book(&self) -> MutexGuard<'_, Book> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The shards' threads, in their order.
    pub(super) fn connect(&self, shards: Vec<Remote>) {
        self.book().shards = shards;
    }

    /// A VM's door is open.
    pub(super) fn open(&self, vm: &VmIdentity, export: &str, volume: VolumeId) {
        let mut book = self.book();
        let doors = book.doors.entry(vm.clone()).or_default();
        doors.insert(export.to_owned(), volume);
    }

    /// It is closed.
    pub(super) fn close(&self, vm: &VmIdentity, volume: VolumeId) {
        let mut book = self.book();
        if let Some(doors) = book.doors.get_mut(vm) {
            doors.retain(|_, other| *other != volume);
            if doors.is_empty() {
                book.doors.remove(vm);
            }
        }
    }

    /// The volume that a VM means by a name. The empty one means its only one.
    pub(super) fn find(&self, vm: &VmIdentity, name: &str) -> Option<VolumeId> {
        let book = self.book();
        let doors = book.doors.get(vm)?;
        match (doors.get(name), doors.len()) {
            (Some(volume), _) => Some(*volume),
            (None, 1) if name.is_empty() => doors.values().next().copied(),
            _ => None,
        }
    }

    /// Names and descriptions of all that a VM has.
    pub(super) fn list(&self, vm: &VmIdentity) -> Vec<(String, String)> {
        let book = self.book();
        let names = book.doors.get(vm).into_iter().flat_map(BTreeMap::keys);
        names
            .map(|name| (name.clone(), format!("volume of VM {}", vm.vm)))
            .collect()
    }

    /// A place for a connection that has not said who it is; `None` when there is none.
    pub(super) fn stranger(self: &Arc<Self>) -> Option<Ticket> {
        let mut book = self.book();
        if book.strangers >= NBD_STRANGERS_MAX || book.strangers + book.guests >= NBD_CONNECTIONS_MAX {
            return None;
        }
        book.strangers += 1;
        Some(Ticket {
            switchboard: self.clone(),
            customer: None,
        })
    }

    /// A place for a VM's connection, instead of a stranger's.
    fn guest(self: &Arc<Self>, customer: &Name) -> Option<Ticket> {
        let mut book = self.book();
        let count = book.by_customer.entry(customer.clone()).or_default();
        if *count >= NBD_CONNECTIONS_PER_CUSTOMER {
            return None;
        }
        *count += 1;
        book.guests += 1;
        Some(Ticket {
            switchboard: self.clone(),
            customer: Some(customer.clone()),
        })
    }

    /// What a VM may see before it has named a volume; `None` when its customer has all the connections it may have.
    pub(super) fn admit(self: &Arc<Self>, identity: VmIdentity) -> Option<Lobby> {
        let ticket = self.guest(&identity.customer)?;
        Some(Lobby { identity, ticket })
    }

    /// Brings a VM's connection to the volume's door.
    pub(crate) fn hand_over(&self, volume: VolumeId, guest: Guest) {
        let shard = {
            let book = self.book();
            let index = super::index_of(volume.as_bytes(), book.shards.len());
            book.shards.get(index).cloned()
        };
        let Some(shard) = shard else { return };
        // If the data plane has ended, so has the connection.
        let _ = shard.post(move || {
            if let Some(registry) = registry_here() {
                take(&registry, volume, guest);
            }
        });
    }
}

fn take(registry: &Rc<Registry>, volume: VolumeId, guest: Guest) {
    match registry.door(volume) {
        Some(door) => door.take(guest),
        // Closed while the connection was on its way.
        None => tracing::debug!(%volume, "a guest comes to a closed door"),
    }
}

/// What a VM may see that has not named a volume yet.
pub(super) struct Lobby {
    pub(super) identity: VmIdentity,
    pub(super) ticket: Ticket,
}

impl Exports for Lobby {
    fn find(&self, name: &str) -> Lookup {
        match self.ticket.switchboard.find(&self.identity, name) {
            Some(volume) => Lookup::Elsewhere(volume),
            None => Lookup::Missing,
        }
    }

    fn list(&self) -> Vec<(String, String)> {
        self.ticket.switchboard.list(&self.identity)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vm(uri: &str) -> VmIdentity {
        VmIdentity::from_uri(uri).unwrap()
    }

    #[test]
    fn a_vm_finds_its_own_volumes_by_name_and_nobody_elses() {
        let switchboard = Switchboard::default();
        let (one, two, theirs) = (VolumeId::random(), VolumeId::random(), VolumeId::random());
        let (acme, globex) = (vm("vold://acme/vm1"), vm("vold://globex/vm1"));
        switchboard.open(&acme, "acme/one", one);
        assert_eq!(switchboard.find(&acme, ""), Some(one));
        switchboard.open(&acme, "acme/two", two);
        switchboard.open(&globex, "globex/db", theirs);
        assert_eq!(switchboard.find(&acme, "acme/two"), Some(two));
        assert_eq!(
            switchboard.find(&acme, ""),
            None,
            "of two, neither is the default"
        );
        assert_eq!(switchboard.find(&acme, "globex/db"), None);
        assert_eq!(switchboard.find(&vm("vold://acme/vm2"), "acme/one"), None);
        let names: Vec<String> = switchboard
            .list(&acme)
            .into_iter()
            .map(|(name, _)| name)
            .collect();
        assert_eq!(names, ["acme/one", "acme/two"]);
        switchboard.close(&acme, one);
        switchboard.close(&acme, two);
        assert!(switchboard.list(&acme).is_empty() && switchboard.find(&acme, "acme/one").is_none());
        assert_eq!(
            switchboard.0.lock().unwrap().doors.len(),
            1,
            "nothing is kept of who has nothing"
        );
    }

    #[test]
    fn strangers_and_customers_have_their_limits_and_places_come_back() {
        let switchboard = Arc::new(Switchboard::default());
        let strangers: Vec<Ticket> = std::iter::from_fn(|| switchboard.stranger()).collect();
        assert_eq!(strangers.len(), NBD_STRANGERS_MAX);
        let acme: Name = "acme".parse().unwrap();
        let guests: Vec<Ticket> = std::iter::from_fn(|| switchboard.guest(&acme)).collect();
        assert_eq!(guests.len(), NBD_CONNECTIONS_PER_CUSTOMER);
        assert!(switchboard.guest(&"globex".parse().unwrap()).is_some());
        drop((strangers, guests));
        let book = switchboard.book();
        assert_eq!((book.strangers, book.guests, book.by_customer.len()), (0, 0, 0));
    }
}
