//! Amounts as Kubernetes writes them, of memory and of all else.

/// Suffixes and what they stand for.
const SUFFIXES: [(&str, f64); 16] = [
    ("Ki", 1024.0),
    ("Mi", 1_048_576.0),
    ("Gi", 1_073_741_824.0),
    ("Ti", 1_099_511_627_776.0),
    ("Pi", 1_125_899_906_842_624.0),
    ("Ei", 1_152_921_504_606_846_976.0),
    ("n", 1e-9),
    ("u", 1e-6),
    ("m", 1e-3),
    ("k", 1e3),
    ("M", 1e6),
    ("G", 1e9),
    ("T", 1e12),
    ("P", 1e15),
    ("E", 1e18),
    ("", 1.0),
];

/// The number that a quantity such as `250m`, `80Gi` or `1e9` stands for; `None` where it is none, or has a sign.
pub fn parse_quantity(quantity: &str) -> Option<f64> {
    let (number, factor) =
        SUFFIXES.iter().find_map(|(suffix, factor)| Some((quantity.strip_suffix(suffix)?, *factor)))?;
    let plain = number.starts_with(|c: char| c.is_ascii_digit() || c == '.')
        && number.bytes().all(|b| b.is_ascii_digit() || b".eE+-".contains(&b));
    Some(number.parse::<f64>().ok().filter(|_| plain)? * factor)
}

/// The bytes of a quantity such as `80Gi`, `1.5T` or `1e9`; `None` where it is none, or below one byte.
pub fn parse_bytes(quantity: &str) -> Option<u64> {
    let bytes = parse_quantity(quantity)?;
    (bytes >= 1.0 && bytes < u64::MAX as f64).then_some(bytes as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_are_read_as_kubernetes_writes_them() {
        for (text, bytes) in [
            ("80Gi", Some(80 << 30)),
            ("1Ti", Some(1 << 40)),
            ("1.5Gi", Some(3 << 29)),
            ("64M", Some(64_000_000)),
            ("1e9", Some(1_000_000_000)),
            ("123", Some(123)),
            ("2E", Some(2_000_000_000_000_000_000)),
            ("0", None),
            ("500m", None),
            ("128974848000m", Some(128_974_848)),
            ("-1Gi", None),
            ("80 Gi", None),
            ("80GB", None),
            ("Gi", None),
            ("", None),
            ("infGi", None),
            ("99Ei", None),
        ] {
            assert_eq!(parse_bytes(text), bytes, "{text}");
        }
    }

    #[test]
    fn amounts_of_every_kind_are_compared_by_their_numbers() {
        let sorted = ["100n", "1e-3", "250m", "0.5", "1", "1k", "1Ki", "1M", "1Mi", "1e7", "2Gi", "1E", "1Ei"];
        let numbers: Vec<_> = sorted.iter().map(|text| parse_quantity(text).unwrap()).collect();
        assert!(numbers.is_sorted(), "{numbers:?}");
        assert_eq!(parse_quantity("250m"), Some(0.25));
        for none in ["-1", "+1", "1 m", "nan", "infm", "e3", ""] {
            assert_eq!(parse_quantity(none), None, "{none}");
        }
    }
}
