//! Where a VM that comes over TLS finds its volumes, on whichever shard they live; and how many may come.
//!
//! A VM sees what it has attached, and nothing else: names are looked up among its own only, so that a foreign name and one
//! that does not exist take the same way and the same time. The book is kept by the doors, which open and close with the
//! attachments; who asks a door is judged by it again.

use std::collections::{BTreeMap, HashMap};
use std::hash::Hash;
use std::net::{IpAddr, Ipv6Addr};
use std::rc::Rc;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use libvol::ids::{Name, VolumeId};
use libvol::limits::{
    NBD_CONNECTIONS_MAX, NBD_CONNECTIONS_PER_CUSTOMER, NBD_STRANGERS_MAX, NBD_STRANGERS_PER_ADDRESS,
};
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
    /// Where they come from.
    strangers_from: HashMap<Network, usize>,
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
    whose: Whose,
}

enum Whose {
    Stranger(Network),
    Customer(Name),
}

/// What counts as one address: whoever has an IPv6 address has the 2^64 of its network.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Network(IpAddr);

impl Network {
    fn of(address: IpAddr) -> Self {
        // A socket for both families shows IPv4 as ::ffff:a.b.c.d.
        Self(match address.to_canonical() {
            IpAddr::V6(v6) => {
                let prefix = v6.to_bits() >> 64 << 64;
                IpAddr::V6(Ipv6Addr::from_bits(prefix))
            }
            v4 => v4,
        })
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let mut book = self.switchboard.book();
        match &self.whose {
            Whose::Stranger(network) => {
                book.strangers -= 1;
                one_less(&mut book.strangers_from, network);
            }
            Whose::Customer(customer) => {
                book.guests -= 1;
                one_less(&mut book.by_customer, customer);
            }
        }
    }
}

/// What has none is not kept.
fn one_less<K: Eq + Hash>(counts: &mut HashMap<K, usize>, key: &K) {
    if let Some(count) = counts.get_mut(key) {
        *count -= 1;
        if *count == 0 {
            counts.remove(key);
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

    /// Connections that have not said who they are.
    pub(super) fn strangers(&self) -> usize {
        self.book().strangers
    }

    /// A place for a connection that has not said who it is; `None` when there is none, or none for that address.
    pub(super) fn stranger(self: &Arc<Self>, from: IpAddr) -> Option<Ticket> {
        let network = Network::of(from);
        let mut book = self.book();
        if book.strangers >= NBD_STRANGERS_MAX || book.strangers + book.guests >= NBD_CONNECTIONS_MAX {
            return None;
        }
        let of_network = book.strangers_from.get(&network).copied().unwrap_or_default();
        if of_network >= NBD_STRANGERS_PER_ADDRESS {
            return None;
        }
        book.strangers_from.insert(network, of_network + 1);
        book.strangers += 1;
        Some(Ticket {
            switchboard: self.clone(),
            whose: Whose::Stranger(network),
        })
    }

    /// A place for a VM's connection, instead of a stranger's.
    fn guest(self: &Arc<Self>, customer: &Name) -> Option<Ticket> {
        let mut book = self.book();
        let of_customer = book.by_customer.get(customer).copied().unwrap_or_default();
        if of_customer >= NBD_CONNECTIONS_PER_CUSTOMER {
            return None;
        }
        book.by_customer.insert(customer.clone(), of_customer + 1);
        book.guests += 1;
        Some(Ticket {
            switchboard: self.clone(),
            whose: Whose::Customer(customer.clone()),
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
        let hosts = (0..=255).map(|host| IpAddr::from([192, 0, 2, host]));
        let fill = |from: IpAddr| std::iter::from_fn(move || Some(from));
        let places = &switchboard;
        let of_all = hosts.flat_map(|host| fill(host).map_while(|from| places.stranger(from)));
        let strangers: Vec<Ticket> = of_all.collect();
        assert_eq!(strangers.len(), NBD_STRANGERS_MAX);
        let acme: Name = "acme".parse().unwrap();
        let guests: Vec<Ticket> = std::iter::from_fn(|| switchboard.guest(&acme)).collect();
        assert_eq!(guests.len(), NBD_CONNECTIONS_PER_CUSTOMER);
        assert!(switchboard.guest(&"globex".parse().unwrap()).is_some());
        drop((strangers, guests));
        let book = switchboard.book();
        assert_eq!((book.strangers, book.guests), (0, 0));
        assert!(book.by_customer.is_empty() && book.strangers_from.is_empty());
    }

    #[test]
    fn an_address_has_its_share_of_the_strangers_places_and_an_ipv6_network_counts_as_one() {
        let ip = |text: &str| text.parse::<IpAddr>().unwrap();
        for (one, same, other) in [
            ("192.0.2.7", "::ffff:192.0.2.7", "192.0.2.8"),
            ("2001:db8::1", "2001:db8::ffff:0:0:1", "2001:db8:0:1::1"),
        ] {
            let switchboard = Arc::new(Switchboard::default());
            let mut held: Vec<Ticket> = std::iter::from_fn(|| switchboard.stranger(ip(one))).collect();
            assert_eq!(held.len(), NBD_STRANGERS_PER_ADDRESS);
            assert!(switchboard.stranger(ip(same)).is_none(), "{one} is {same}");
            assert!(switchboard.stranger(ip(other)).is_some(), "{one} is not {other}");
            held.pop();
            assert!(switchboard.stranger(ip(same)).is_some(), "a place came back");
        }
    }
}
