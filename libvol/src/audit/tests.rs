use std::fs;

use super::*;

fn event(detail: &str) -> Event {
    Event {
        actor: "uid 0".into(),
        action: "volume.create".into(),
        subject: "acme/web".into(),
        outcome: AuditOutcome::Done,
        detail: detail.into(),
    }
}

fn filled(count: u64) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let log = Log::open(dir.path()).unwrap();
    (0..count).for_each(|i| log.append(event(&format!("number {i}"))).unwrap());
    let path = dir.path().join(format!("{:020}.log", 1));
    (dir, path)
}

#[test]
fn lines_are_numbered_chained_and_still_there_after_a_reopening() {
    let (dir, _) = filled(3);
    let log = Log::open(dir.path()).unwrap();
    log.append(event("after")).unwrap();
    let all = log.list(Some(0), 100).unwrap();
    let seqs: Vec<u64> = all.iter().map(|entry| entry.seq).collect();
    assert_eq!(seqs, [1, 2, 3, 4]);
    assert_eq!(all[3].detail, "after");
    let verified = log.verify().unwrap();
    assert_eq!((verified.entries, verified.first, verified.last), (4, 1, 4));
    assert_eq!(log.list(None, 2).unwrap(), all[2..]);
    assert_eq!(log.list(Some(1), 2).unwrap(), all[1..3]);
    assert_eq!(log.list(Some(4), 2).unwrap(), []);
}

#[test]
fn a_line_that_is_changed_taken_out_or_put_in_is_found() {
    let (dir, path) = filled(5);
    let whole = fs::read(&path).unwrap();
    let lines: Vec<&[u8]> = whole.split_inclusive(|byte| *byte == b'\n').collect();
    let text = String::from_utf8(whole.clone()).unwrap();
    let changed = text.replacen("number 2", "number 7", 1).into_bytes();
    let taken_out = [lines[0], lines[1], lines[3], lines[4]].concat();
    let put_in = [lines[0], lines[1], lines[1], lines[2], lines[3], lines[4]].concat();
    let first_gone = lines[1..].concat();
    for (what, bytes) in [
        ("changed", changed),
        ("taken out", taken_out),
        ("put in", put_in),
        ("first gone", first_gone),
        ("garbage", [lines[0], b"\xff{}\n", lines[1]].concat()),
    ] {
        fs::write(&path, bytes).unwrap();
        let found = verify(dir.path()).expect_err(what);
        assert_eq!(found.kind(), Kind::Damaged, "{what}: {found}");
    }
    fs::write(&path, whole).unwrap();
    verify(dir.path()).unwrap();
}

#[test]
fn a_line_cut_short_by_a_crash_is_cut_off_and_damage_does_not_stop_a_start() {
    let (dir, path) = filled(3);
    let whole = fs::read(&path).unwrap();
    for cut in 1..whole.len() {
        fs::write(&path, &whole[..cut]).unwrap();
        let log = Log::open(dir.path()).unwrap();
        log.append(event("next")).unwrap();
        let verified = log.verify().unwrap();
        let ends = whole[..cut].iter().filter(|byte| **byte == b'\n').count() as u64;
        assert_eq!(verified.entries, ends + 1, "cut at {cut}");
    }
    fs::write(&path, [&whole[..], b"garbage\n"].concat()).unwrap();
    let log = Log::open(dir.path()).unwrap();
    log.append(event("next")).unwrap();
    assert_eq!(log.verify().unwrap_err().kind(), Kind::Damaged);
}

#[test]
fn a_full_file_is_followed_by_another_and_the_oldest_may_be_moved_away() {
    let (dir, path) = filled(2);
    let log = Log::open(dir.path()).unwrap();
    log.end.lock().unwrap().bytes = AUDIT_FILE_BYTES;
    log.append(event("in the second file")).unwrap();
    log.append(event("too")).unwrap();
    assert_eq!(files(dir.path()).unwrap().len(), 2);
    assert_eq!(log.verify().unwrap().entries, 4);
    assert_eq!(log.list(Some(1), 2).unwrap().len(), 2);
    fs::remove_file(path).unwrap();
    let verified = log.verify().unwrap();
    assert_eq!((verified.first, verified.entries), (3, 2));
}

#[test]
fn a_file_that_was_begun_before_a_crash_and_has_no_line_goes_on_with_the_chain() {
    let (dir, _) = filled(2);
    fs::write(dir.path().join(format!("{:020}.log", 3)), b"").unwrap();
    let log = Log::open(dir.path()).unwrap();
    log.append(event("third")).unwrap();
    assert_eq!(log.verify().unwrap().entries, 3);
}

#[test]
fn texts_are_cut_where_a_character_ends() {
    let (dir, _) = filled(0);
    let log = Log::open(dir.path()).unwrap();
    log.append(event(&"ü".repeat(AUDIT_TEXT_BYTES_MAX))).unwrap();
    let entry = log.list(None, 1).unwrap().remove(0);
    assert!(entry.detail.len() <= AUDIT_TEXT_BYTES_MAX && !entry.detail.is_empty());
    log.verify().unwrap();
}
