//! Places of the list of replicas: one is taken in, one is made vacant.
//!
//! A replica moves by both: the new place is stale and catches up with everything ([`super::resync`]), and once it is in
//! sync the old one leaves, like one that was dropped, and its place becomes vacant. The volume serves all the while. Each
//! change of the list is durable, in the register and on the stores in sync, before it is relied on; a cut leaves the list
//! before or after it.
//!
//! What extents say of a vacant place (`missed by`) is not looked at: whoever takes it is copied whole.

use super::core::Core;
use super::missed::Missed;
use super::replicas::{Role, Seat};
use crate::error::{Error, Result};
use crate::ids::StoreId;
use crate::limits::VOLUME_PLACES_MAX;

impl Core {
    /// See [`super::Volume::add_replica`].
    pub(super) async fn take_in(&self, store: StoreId, name: String) -> Result<usize> {
        let used = self.places.get();
        let taken = |seat: &Seat| seat.role.get() != Role::Vacant && seat.store.get() == store;
        if let Some(place) = self.seats[..used].iter().position(taken) {
            return Ok(place);
        }
        let vacant = self.seats[..used]
            .iter()
            .position(|seat| seat.role.get() == Role::Vacant);
        let place = vacant.unwrap_or(used);
        if place == VOLUME_PLACES_MAX {
            return Err(Error::no_space(format!(
                "volume {}: all {VOLUME_PLACES_MAX} places for replicas are taken; wait until one that moves has left",
                self.label
            )));
        }
        let seat = &self.seats[place];
        seat.store.set(store);
        seat.name.replace(name);
        seat.reason.replace(Some("it is new, and not copied yet".into()));
        seat.full_copy.set(true);
        seat.missed.replace(Missed::default());
        seat.places.borrow_mut().clear();
        seat.role.set(Role::Stale);
        self.places.set(used.max(place + 1));
        self.write_down_membership().await;
        self.check()?;
        Ok(place)
    }

    /// Nothing of the volume is in flight on a replica's store when this returns, and nothing begins. The replica is out.
    pub(super) async fn let_go_of(&self, seat: &Seat) {
        self.marking.all_so_far().await;
        seat.idle.until(|| seat.is_idle().then_some(())).await;
        seat.set_io(None);
    }

    /// See [`super::Volume::remove_replica`].
    pub(super) async fn make_vacant(&self, place: usize) -> Result<()> {
        let seat = &self.seats[place];
        match seat.role.get() {
            Role::Vacant => return Ok(()),
            Role::InSync if self.in_sync().len() == 1 => {
                return Err(Error::busy(format!(
                    "volume {}: the replica on store \"{}\" is the only one in sync",
                    self.label,
                    seat.name.borrow()
                )));
            }
            Role::InSync => {
                // The others are to show that they can go on alone, before this one is no longer believed.
                self.sync_all().await?;
                if self.in_sync().len() == 1 || seat.role.get() != Role::InSync {
                    return Err(Error::busy(format!(
                        "volume {}: another replica has just failed; the one on store \"{}\" stays for now",
                        self.label,
                        seat.name.borrow()
                    )));
                }
                self.begin_leaving(place, "its place is taken over".into());
            }
            Role::Joining => self.stop_joining(place, "its place is taken over"),
            Role::Dropping | Role::Stale => {}
        }
        self.wait_for(|| (seat.role.get() == Role::Stale).then_some(()))
            .await?;
        self.let_go_of(seat).await;
        seat.role.set(Role::Vacant);
        seat.store.set(StoreId::NIL);
        seat.reason.replace(None);
        seat.full_copy.set(false);
        seat.missed.replace(Missed::default());
        self.write_down_membership().await;
        self.check()?;
        tracing::info!(volume = %self.label, store = %seat.name.borrow(), epoch = %self.epoch.get(), "replica has left");
        Ok(())
    }
}
