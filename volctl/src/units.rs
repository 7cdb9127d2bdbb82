//! Sizes, durations and times as people write and read them.
//!
//! | what | written | read |
//! |---|---|---|
//! | size | `4096`, `64K`, `512M`, `10G`, `1T`, in either case, `iB` allowed behind the letter | `3.2 GiB` |
//! | duration | `30s`, `10m`, `12h`, `7d` | `2 d 3 h` |
//! | time | | `2026-03-01 12:00:00 UTC` |
//!
//! Sizes are powers of 1024 and whole: `1.5G` is refused with the size that says the same, and `10GB` is refused
//! because half of the world means powers of 1000 by it. Whether a size *fits* (zero, multiples, limits) is the
//! daemon's to say, so that every client gets the same answer.

use std::time::Duration;

/// Letters of the powers of 1024, from the first.
const UNITS: [char; 4] = ['K', 'M', 'G', 'T'];

/// A number of bytes.
///
/// # Errors
/// One line that says what is wrong and how to write it.
pub(crate) fn parse_size(text: &str) -> Result<u64, String> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, suffix) = text.split_at(digits);
    if suffix.starts_with(['.', ',']) && digits > 0 {
        return Err("sizes are whole numbers; use the next smaller unit, for example 1536M for 1.5G".into());
    }
    if number.is_empty() {
        return Err(format!("not a size; {SIZE_HINT}"));
    }
    let shift = shift_of(suffix)?;
    let number = number.parse::<u64>().ok();
    number
        .and_then(|n| n.checked_mul(1 << shift))
        .ok_or_else(|| "more than 2^64 - 1 bytes; no volume or store is that large".into())
}

const SIZE_HINT: &str = "write bytes, or a whole number with K, M, G or T (powers of 1024), for example 10G";

/// Power of two behind a suffix.
fn shift_of(suffix: &str) -> Result<u32, String> {
    let Some(letter) = suffix.chars().next() else {
        return Ok(0);
    };
    let upper = letter.to_ascii_uppercase();
    let Some(power) = UNITS.iter().position(|unit| *unit == upper) else {
        return Err(format!("no such unit; {SIZE_HINT}"));
    };
    match &suffix[1..] {
        "" | "iB" => Ok(10 * (power as u32 + 1)),
        "B" => Err(format!(
            "units are powers of 1024; write {upper} or {upper}iB instead of {letter}B"
        )),
        _ => Err(format!("no such unit; {SIZE_HINT}")),
    }
}

/// A span of time: a whole number with `s`, `m`, `h` or `d`.
///
/// # Errors
/// One line that says how to write it.
pub(crate) fn parse_duration(text: &str) -> Result<Duration, String> {
    let hint = || "write a whole number with s, m, h or d, for example 30s or 12h".to_string();
    let unit = text.chars().last().ok_or_else(hint)?;
    let seconds_each = match unit {
        's' => 1,
        'm' => 60,
        'h' => 3_600,
        'd' => 86_400,
        _ => return Err(hint()),
    };
    let number = &text[..text.len() - 1];
    if number.is_empty() || !number.bytes().all(|c| c.is_ascii_digit()) {
        return Err(hint());
    }
    // A hundred years is more than anyone waits, and keeps every sum with "now" in range.
    const SECONDS_MAX: u64 = 100 * 366 * 86_400;
    number
        .parse::<u64>()
        .ok()
        .and_then(|n| n.checked_mul(seconds_each))
        .filter(|seconds| *seconds <= SECONDS_MAX)
        .map(Duration::from_secs)
        .ok_or_else(|| "longer than a hundred years".into())
}

/// A size for people: whole where exact, else cut to a tenth (never more than there is).
pub(crate) fn size(bytes: u64) -> String {
    let mut shift = 0;
    while shift < 10 * UNITS.len() as u32 && bytes >> shift >= 1024 {
        shift += 10;
    }
    if shift == 0 {
        return format!("{bytes} B");
    }
    let unit = UNITS[shift as usize / 10 - 1];
    if bytes.trailing_zeros() >= shift {
        return format!("{} {unit}iB", bytes >> shift);
    }
    // bytes * 10 would overflow above 1.6 EiB.
    let tenths = (u128::from(bytes) * 10) >> shift;
    format!("{}.{} {unit}iB", tenths / 10, tenths % 10)
}

/// A span of time for people: its two largest units.
pub(crate) fn span(seconds: u64) -> String {
    let (d, h, m, s) = (
        seconds / 86_400,
        seconds / 3_600 % 24,
        seconds / 60 % 60,
        seconds % 60,
    );
    match (d, h, m) {
        (0, 0, 0) => format!("{s} s"),
        (0, 0, _) => format!("{m} min {s} s"),
        (0, _, _) => format!("{h} h {m} min"),
        _ => format!("{d} d {h} h"),
    }
}

/// Seconds since 1970 as a date and time, UTC.
pub(crate) fn time(unix_seconds: u64) -> String {
    // Count years from 1 March of year 0, so that the leap day is the last day of a year; an era is 400 years.
    const DAYS_PER_ERA: u64 = 400 * 365 + 97;
    const DAYS_FROM_0000_03_01_TO_1970: u64 = 719_468;
    let days = unix_seconds / 86_400 + DAYS_FROM_0000_03_01_TO_1970;
    let (era, day_of_era) = (days / DAYS_PER_ERA, days % DAYS_PER_ERA);
    // Take out the leap days before this day: one each 4 years (1,460 days before the first is over), none each 100.
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    // From March the months repeat 31, 30, 31, 30, 31: 153 days each five.
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let (month, next_year) = match month_from_march {
        0..=9 => (month_from_march + 3, 0),
        _ => (month_from_march - 9, 1),
    };
    let year = era * 400 + year_of_era + next_year;
    let (hour, minute, second) = (
        unix_seconds / 3_600 % 24,
        unix_seconds / 60 % 60,
        unix_seconds % 60,
    );
    format!("{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02} UTC")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_whole_numbers_of_bytes_or_powers_of_1024() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("64K", 64 << 10),
            ("512M", 512 << 20),
            ("10G", 10 << 30),
            ("10g", 10 << 30),
            ("10GiB", 10 << 30),
            ("1T", 1 << 40),
            ("18446744073709551615", u64::MAX),
            ("16777215T", 16_777_215 << 40),
        ] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn what_is_not_a_size_is_refused_with_a_hint() {
        for (text, hint) in [
            ("", "not a size"),
            ("G", "not a size"),
            ("-1", "not a size"),
            ("+1", "not a size"),
            (" 1", "not a size"),
            (".5G", "not a size"),
            ("1.5G", "1536M"),
            ("1,5G", "1536M"),
            ("10GB", "write G or GiB"),
            ("10mB", "write M or MiB"),
            ("10X", "no such unit"),
            ("10 G", "no such unit"),
            ("10Gb", "no such unit"),
            ("10G1", "no such unit"),
            ("1é", "no such unit"),
            ("1Gé", "no such unit"),
            ("0x10", "no such unit"),
            ("18446744073709551616", "2^64"),
            ("16777216T", "2^64"),
            ("99999999999999999999999G", "2^64"),
        ] {
            let error = parse_size(text).expect_err(text);
            assert!(error.contains(hint), "{text}: {error}");
        }
    }

    #[test]
    fn durations_need_a_unit() {
        assert_eq!(parse_duration("30s"), Ok(Duration::from_secs(30)));
        assert_eq!(parse_duration("10m"), Ok(Duration::from_secs(600)));
        assert_eq!(parse_duration("12h"), Ok(Duration::from_secs(43_200)));
        assert_eq!(parse_duration("30d"), Ok(Duration::from_secs(2_592_000)));
        for bad in [
            "",
            "s",
            "30",
            "-1s",
            "1.5h",
            "1é",
            "999999999d",
            "99999999999999999999s",
            "1w",
        ] {
            assert!(parse_duration(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_shown_size_is_exact_or_cut_never_rounded_up() {
        for (bytes, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1 KiB"),
            (1536, "1.5 KiB"),
            (10 << 30, "10 GiB"),
            ((10 << 30) + 1, "10.0 GiB"),
            ((1 << 30) - 1, "1023.9 MiB"),
            (64 << 40, "64 TiB"),
            (u64::MAX, "16777215.9 TiB"),
        ] {
            assert_eq!(size(bytes), text);
        }
    }

    #[test]
    fn a_whole_shown_size_can_be_typed_back() {
        for bytes in [64 << 10, 4 << 20, 10 << 30, 64_u64 << 40] {
            assert_eq!(parse_size(&size(bytes).replace(' ', "")), Ok(bytes));
        }
    }

    #[test]
    fn spans_show_their_two_largest_units() {
        for (seconds, text) in [
            (0, "0 s"),
            (61, "1 min 1 s"),
            (3_600, "1 h 0 min"),
            (2 * 86_400 + 3 * 3_600 + 59, "2 d 3 h"),
        ] {
            assert_eq!(span(seconds), text);
        }
    }

    #[test]
    fn times_are_right_at_the_ends_of_months_years_and_leap_days() {
        for (seconds, text) in [
            (0, "1970-01-01 00:00:00 UTC"),
            (68_169_599, "1972-02-28 23:59:59 UTC"),
            (68_169_600, "1972-02-29 00:00:00 UTC"),
            (951_782_400, "2000-02-29 00:00:00 UTC"),
            (951_868_800, "2000-03-01 00:00:00 UTC"),
            (1_767_225_599, "2025-12-31 23:59:59 UTC"),
            (4_107_542_400, "2100-03-01 00:00:00 UTC"),
            (4_107_542_399, "2100-02-28 23:59:59 UTC"),
        ] {
            assert_eq!(time(seconds), text);
        }
    }
}
