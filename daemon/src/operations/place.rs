//! Where a new volume's replicas go. Pure.

use std::collections::BTreeMap;

use libvol::ids::{Name, StoreId};
use libvol::limits::REPLICAS_MAX;
use libvol::{Error, Result};

/// A store that could take a replica.
#[derive(Clone, Debug)]
pub(super) struct Candidate {
    /// Which.
    pub(super) id: StoreId,
    /// Its failure domain.
    pub(super) zone: Name,
    /// Free bytes.
    pub(super) free_bytes: u64,
    /// Extent size.
    pub(super) extent_bytes: u64,
}

/// Chooses stores of different zones with the most free space, all of one extent size (replicas share their extent
/// boundaries). `replicas` absent: two where there are two zones, else one.
///
/// # Errors
/// `Invalid` for a count out of range; `NoSpace` when there are not enough zones.
pub(super) fn place(candidates: &[Candidate], replicas: Option<usize>) -> Result<Vec<StoreId>> {
    if let Some(count) = replicas
        && !(1..=REPLICAS_MAX).contains(&count)
    {
        return Err(Error::invalid(format!(
            "{count} replicas; a volume has 1 to {REPLICAS_MAX}"
        )));
    }
    let mut by_extent: BTreeMap<u64, BTreeMap<&Name, &Candidate>> = BTreeMap::new();
    for candidate in candidates {
        let best = by_extent
            .entry(candidate.extent_bytes)
            .or_default()
            .entry(&candidate.zone)
            .or_insert(candidate);
        if candidate.free_bytes > best.free_bytes {
            *best = candidate;
        }
    }
    let widest = by_extent.values().map(BTreeMap::len).max().unwrap_or(0);
    if widest == 0 {
        return Err(Error::no_space(
            "no store is online; add one with `volctl store add`",
        ));
    }
    let count = replicas.unwrap_or_else(|| widest.min(2));
    let chosen = by_extent
        .values()
        .filter(|zones| zones.len() >= count)
        .map(|zones| {
            let mut best: Vec<&Candidate> = zones.values().copied().collect();
            best.sort_by_key(|c| (std::cmp::Reverse(c.free_bytes), c.id));
            best.truncate(count);
            best
        })
        // Of several extent sizes, the one whose fullest chosen store has the most room.
        .max_by_key(|best| best.last().map_or(0, |c| c.free_bytes));
    match chosen {
        Some(best) => Ok(best.into_iter().map(|c| c.id).collect()),
        None => {
            let mut zones: Vec<&str> = candidates.iter().map(|c| c.zone.as_str()).collect();
            zones.sort_unstable();
            zones.dedup();
            let alike = if zones.len() >= count {
                "; no extent size is common to enough of them"
            } else {
                ""
            };
            Err(Error::no_space(format!(
                "{count} replicas need {count} zones, and the online stores are in {} zone{} ({}){alike}; add a store in another zone, or use --replicas {widest}",
                zones.len(),
                if zones.len() == 1 { "" } else { "s" },
                zones.join(", ")
            )))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use libvol::Kind;

    fn candidate(zone: &str, free_bytes: u64, extent_bytes: u64) -> Candidate {
        Candidate {
            id: StoreId::random(),
            zone: zone.parse().unwrap(),
            free_bytes,
            extent_bytes,
        }
    }

    #[test]
    fn replicas_go_to_different_zones_with_the_most_free_space() {
        let stores = [
            candidate("a", 10, 4),
            candidate("a", 20, 4),
            candidate("b", 5, 4),
            candidate("c", 7, 4),
        ];
        let ids = |picks: &[usize]| picks.iter().map(|i| stores[*i].id).collect::<Vec<_>>();
        assert_eq!(place(&stores, Some(1)).unwrap(), ids(&[1]));
        assert_eq!(place(&stores, None).unwrap(), ids(&[1, 3]));
        assert_eq!(place(&stores, Some(3)).unwrap(), ids(&[1, 3, 2]));
    }

    #[test]
    fn without_a_count_one_zone_gives_one_replica() {
        let stores = [candidate("a", 10, 4), candidate("a", 20, 4)];
        assert_eq!(place(&stores, None).unwrap(), [stores[1].id]);
    }

    #[test]
    fn more_replicas_than_zones_are_refused_with_the_zones() {
        let stores = [candidate("rack-b", 10, 4), candidate("rack-a", 20, 4)];
        let error = place(&stores, Some(3)).unwrap_err();
        assert_eq!(error.kind(), Kind::NoSpace);
        assert!(error.to_string().contains("(rack-a, rack-b)"), "{error}");
        assert!(error.to_string().contains("--replicas 2"), "{error}");
        assert_eq!(place(&[], None).unwrap_err().kind(), Kind::NoSpace);
        for count in [0, 4, usize::MAX] {
            assert_eq!(place(&stores, Some(count)).unwrap_err().kind(), Kind::Invalid);
        }
    }

    #[test]
    fn replicas_share_one_extent_size() {
        let stores = [
            candidate("a", 90, 8),
            candidate("b", 10, 4),
            candidate("c", 20, 4),
        ];
        let chosen = place(&stores, Some(2)).unwrap();
        assert_eq!(chosen, [stores[2].id, stores[1].id]);
        assert_eq!(place(&stores, Some(1)).unwrap(), [stores[0].id]);
        let error = place(&stores[..2], Some(2)).unwrap_err();
        assert!(error.to_string().contains("extent size"), "{error}");
    }
}
