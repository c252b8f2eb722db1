//! Which records share a row: best-fit decreasing (Johnson 1974; Ding 2024 for training), as TRL packs.

use std::collections::BTreeMap;

/// Packs `records` of so many tokens into rows of at most `room` tokens. Returns the records row after row, and where each row
/// ends. The longest come first, each into the row with the least room left that it fits into, or else into a new one; of
/// those with the same length, the first in order comes first, so that the same records are always packed alike.
pub(super) fn rows(records: &[u32], lengths: &[usize], room: usize) -> (Vec<u32>, Vec<u64>) {
    let mut order: Vec<usize> = (0..records.len()).collect();
    order.sort_by_key(|i| std::cmp::Reverse(lengths[*i]));
    let mut row_of = vec![0usize; records.len()];
    let mut sizes: Vec<u64> = Vec::new();
    // Rows by the room that is left in them, of which the last one is taken.
    let mut open: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
    for i in order.iter().copied() {
        let length = lengths[i];
        let fits = open.range(length..).next().map(|(left, _)| *left);
        let (row, left) = match fits {
            Some(left) => {
                let rows = open.entry(left).or_default();
                let row = rows.pop().unwrap_or_default();
                if rows.is_empty() {
                    open.remove(&left);
                }
                (row, left)
            }
            None => {
                sizes.push(0);
                // What is longer than a row is one by itself.
                (sizes.len() - 1, room.max(length))
            }
        };
        row_of[i] = row;
        sizes[row] += 1;
        if left > length {
            open.entry(left - length).or_default().push(row);
        }
    }
    let mut next: Vec<u64> = Vec::with_capacity(sizes.len());
    let mut end = 0;
    for size in &sizes {
        next.push(end);
        end += size;
    }
    let mut packed = vec![0; records.len()];
    for i in order {
        let slot = &mut next[row_of[i]];
        packed[*slot as usize] = records[i];
        *slot += 1;
    }
    (packed, next)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_longest_come_first_each_where_the_least_room_is_left() {
        let lengths = [4, 3, 6, 5, 2, 10, 1];
        let (packed, ends) = rows(&[0, 1, 2, 3, 4, 5, 6], &lengths, 10);
        // 10 | 6 4 | 5 3 2 | 1
        assert_eq!((packed, ends), (vec![5, 2, 0, 3, 1, 4, 6], vec![1, 3, 6, 7]));
    }

    proptest! {
        #[test]
        fn every_record_is_in_one_row_and_no_row_is_too_long(lengths in prop::collection::vec(1usize..20, 0..60), room in 19usize..40) {
            let records: Vec<u32> = (0..lengths.len() as u32).collect();
            let (packed, ends) = rows(&records, &lengths, room);
            let mut sorted = packed.clone();
            sorted.sort_unstable();
            prop_assert_eq!(sorted, records.clone());
            prop_assert_eq!(&(packed.clone(), ends.clone()), &rows(&records, &lengths, room));
            let mut start = 0;
            let mut sizes = Vec::new();
            for end in ends {
                let row = &packed[start..end as usize];
                prop_assert!(!row.is_empty());
                sizes.push(row.iter().map(|record| lengths[*record as usize]).sum::<usize>());
                start = end as usize;
            }
            prop_assert!(start == packed.len() && sizes.iter().all(|size| *size <= room));
            // No two rows would fit into one.
            sizes.sort_unstable();
            prop_assert!(sizes.len() < 2 || sizes[0] + sizes[1] > room, "{sizes:?}");
        }
    }
}
