//! One lock a key, made when first asked for and gone when nobody holds or wants it.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::OwnedMutexGuard;

/// See the module's text.
pub(super) struct Locks<K>(Mutex<HashMap<K, Arc<tokio::sync::Mutex<()>>>>);

impl<K> Default for Locks<K> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<K: Eq + Hash> Locks<K> {
    /// Waits for the key's lock.
    pub(super) async fn lock(&self, key: K) -> OwnedMutexGuard<()> {
        let lock = {
            let mut locks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            // A count of one is the map's own: nobody holds it or waits for it.
            locks.retain(|_, lock| Arc::strong_count(lock) > 1);
            locks.entry(key).or_default().clone()
        };
        lock.lock_owned().await
    }

    /// Who holds or waits for the key's lock.
    #[cfg(test)]
    pub(super) fn holders(&self, key: &K) -> usize {
        let locks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        locks.get(key).map_or(0, |lock| Arc::strong_count(lock) - 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn one_key_is_held_once_and_others_are_free() {
        let locks = Locks::default();
        let a = locks.lock("a").await;
        let _b = locks.lock("b").await;
        assert!(
            tokio::time::timeout(std::time::Duration::ZERO, locks.lock("a"))
                .await
                .is_err()
        );
        drop(a);
        let _a = locks.lock("a").await;
        assert_eq!(locks.0.lock().unwrap().len(), 2);
    }
}
