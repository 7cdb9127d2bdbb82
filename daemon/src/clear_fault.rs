//! `vold clear-fault`: an operator's word that a store whose sync or metadata write failed may be used again.
//!
//! Offline, so that a running daemon never sees a latch open under it. The next start opens the store like after any
//! unclean stop: its dirty extents are reconciled. What a failed device lost beyond them, the checksums find on read.

use libvol::catalog::{Catalog, StoreRecord};
use libvol::{Error, Result};

use crate::args::ClearFault;
use crate::data_dir::DataDir;

/// Clears the latch in the catalog.
///
/// # Errors
/// `Busy` while a daemon runs; `NotFound` for an unknown directory or store; `Invalid` when the store is not latched.
pub(crate) fn run(args: &ClearFault) -> Result<()> {
    let dirs = DataDir::take_existing(&args.data_dir)?;
    let cleared = clear(&Catalog::open(&dirs.catalog())?, args.store.as_str())?;
    println!(
        "store {:?}: cleared; it had failed with: {cleared}",
        args.store.as_str()
    );
    Ok(())
}

/// Clears it; the reason it was latched for.
fn clear(catalog: &Catalog, name: &str) -> Result<String> {
    catalog.write(|tx| {
        let mut store = tx
            .named::<StoreRecord>(name)?
            .ok_or_else(|| Error::not_found(format!("there is no store {name:?}")))?;
        let fault = store.fault.take().ok_or_else(|| {
            Error::invalid(format!(
                "store {name:?} is not latched faulty; there is nothing to clear"
            ))
        })?;
        tx.update(&store)?;
        Ok(fault.reason)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use libvol::Kind;
    use libvol::catalog::StoreFault;
    use libvol::ids::StoreId;

    #[test]
    fn a_latch_is_cleared_once_and_durably() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("catalog.redb");
        let catalog = Catalog::open(&path).unwrap();
        let store = StoreRecord {
            id: StoreId::random(),
            name: "a".parse().unwrap(),
            path: "/a".into(),
            zone: "a".parse().unwrap(),
            extent_bytes: 4 << 20,
            extents: 1,
            allow_buffered: false,
            leaving: None,
            fault: Some(StoreFault {
                reason: "sync: Input/output error".into(),
                since_unix_seconds: 1,
            }),
            created_unix_seconds: 1,
        };
        catalog.write(|tx| tx.insert(&store)).unwrap();
        assert_eq!(clear(&catalog, "b").unwrap_err().kind(), Kind::NotFound);
        assert_eq!(clear(&catalog, "a").unwrap(), "sync: Input/output error");
        assert_eq!(clear(&catalog, "a").unwrap_err().kind(), Kind::Invalid);
        drop(catalog);
        let kept = Catalog::open(&path)
            .unwrap()
            .read(|v| v.named::<StoreRecord>("a"))
            .unwrap()
            .unwrap();
        assert_eq!(kept, StoreRecord { fault: None, ..store });
    }
}
