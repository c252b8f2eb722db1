//! Collectives are exact in every kind at 1, 2 and 4 ranks, refuse what they cannot do, and ranks that do not agree are
//! told so.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod ranks;

use c10d::{Error, ProcessGroup, ReduceOp};
use ranks::{PATIENCE, Rank};
use tch::{Device::Cpu, Kind, Tensor};

const KINDS: [Kind; 3] = [Kind::Float, Kind::BFloat16, Kind::Int64];
/// Elements of one rank's part; odd, so that parts do not end at vector borders.
const PART: i64 = 1003;

#[test]
fn collectives_are_exact_at_1_rank() {
    ranks::run("collectives_are_exact_at_1_rank", 1, check_collectives);
}

#[test]
fn collectives_are_exact_at_2_ranks() {
    ranks::run("collectives_are_exact_at_2_ranks", 2, check_collectives);
}

#[test]
fn collectives_are_exact_at_4_ranks() {
    ranks::run("collectives_are_exact_at_4_ranks", 4, check_collectives);
}

fn check_collectives(rank: Rank) {
    let group = rank.group(PATIENCE);
    assert_eq!((group.rank(), group.world_size()), (rank.rank, rank.world_size));
    for kind in KINDS {
        check_reductions(&group, kind);
        check_gather_and_scatter(&group, kind);
        check_broadcast(&group, kind);
    }
    check_works_in_flight(&group);
    group.barrier().unwrap();
}

/// Rank `r`'s values: integers small enough for sums and quarters of them to be exact in bf16.
fn values(rank: u32, n: i64, kind: Kind) -> Tensor {
    (Tensor::arange(n, (Kind::Int64, Cpu)) * (rank as i64 + 3)).remainder(7).to_kind(kind) + i64::from(rank)
}

fn all_values(group: &ProcessGroup, n: i64, kind: Kind) -> Tensor {
    let each: Vec<Tensor> = (0..group.world_size()).map(|rank| values(rank, n, kind)).collect();
    Tensor::stack(&each, 0)
}

fn reduced(group: &ProcessGroup, n: i64, kind: Kind, op: ReduceOp) -> Tensor {
    let all = all_values(group, n, kind).to_kind(Kind::Double);
    let result = match op {
        ReduceOp::Sum => all.sum_dim_intlist(0, false, Kind::Double),
        ReduceOp::Average => all.mean_dim(0, false, Kind::Double),
        ReduceOp::Min => all.amin(0, false),
        ReduceOp::Max => all.amax(0, false),
    };
    result.to_kind(kind)
}

fn assert_same(found: &Tensor, expected: &Tensor, what: &str) {
    assert_eq!((found.size(), found.kind()), (expected.size(), expected.kind()), "{what}");
    assert!(found.equal(expected), "{what}: values differ");
}

fn check_reductions(group: &ProcessGroup, kind: Kind) {
    let (rank, n) = (group.rank(), PART * i64::from(group.world_size()));
    for op in [ReduceOp::Sum, ReduceOp::Average, ReduceOp::Min, ReduceOp::Max] {
        let what = format!("{op:?} of {kind:?}");
        let tensor = values(rank, n, kind);
        if op == ReduceOp::Average && kind == Kind::Int64 {
            let error = group.all_reduce(&tensor, op).and_then(|work| work.wait()).unwrap_err();
            assert!(matches!(error, Error::Torch(_)), "{what}: {error:?}");
            continue;
        }
        group.all_reduce(&tensor, op).unwrap().wait().unwrap();
        let expected = reduced(group, n, kind, op);
        assert_same(&tensor, &expected, &format!("all_reduce {what}"));

        let part = Tensor::zeros([PART], (kind, Cpu));
        group.reduce_scatter(&part, &values(rank, n, kind), op).unwrap().wait().unwrap();
        assert_same(&part, &expected.narrow(0, i64::from(rank) * PART, PART), &format!("reduce_scatter {what}"));
    }
}

fn check_gather_and_scatter(group: &ProcessGroup, kind: Kind) {
    let (rank, world) = (i64::from(group.rank()), i64::from(group.world_size()));
    // A first dimension that the number of ranks does not divide: sizes count, shapes do not.
    let gathered = Tensor::zeros([PART, world], (kind, Cpu));
    group.all_gather(&gathered, &values(group.rank(), PART, kind)).unwrap().wait().unwrap();
    assert_same(&gathered.view([world, PART]), &all_values(group, PART, kind), "all_gather");

    // The input may be this rank's own part of the output.
    let own = gathered.view([world, PART]).get(rank);
    group.all_gather(&gathered, &own).unwrap().wait().unwrap();
    assert_same(&gathered.view([world, PART]), &all_values(group, PART, kind), "all_gather in place");

    let n = PART * world;
    let exchanged = Tensor::zeros([n], (kind, Cpu));
    group.all_to_all(&exchanged, &values(group.rank(), n, kind)).unwrap().wait().unwrap();
    let expected = all_values(group, n, kind).narrow(1, rank * PART, PART).contiguous().view([n]);
    assert_same(&exchanged, &expected, "all_to_all");
}

fn check_broadcast(group: &ProcessGroup, kind: Kind) {
    for root in 0..group.world_size() {
        let tensor = values(group.rank(), PART, kind);
        group.broadcast(&tensor, root).unwrap().wait().unwrap();
        assert_same(&tensor, &values(root, PART, kind), "broadcast");
    }
}

/// Several at once, waited for in another order, with a tensor that nobody else holds.
fn check_works_in_flight(group: &ProcessGroup) {
    let n = 100_000;
    let tensor = values(group.rank(), n, Kind::Float);
    let first = group.all_reduce(&tensor, ReduceOp::Sum).unwrap();
    let second = group.all_reduce(&values(group.rank(), n, Kind::Float), ReduceOp::Sum).unwrap();
    let scalar = Tensor::from(i64::from(group.rank()));
    let third = group.all_reduce(&scalar, ReduceOp::Max).unwrap();
    third.wait().unwrap();
    second.wait().unwrap();
    first.wait().unwrap();
    assert_same(&tensor, &reduced(group, n, Kind::Float, ReduceOp::Sum), "work in flight");
    assert_eq!(scalar.int64_value(&[]), i64::from(group.world_size()) - 1);
}

#[test]
fn wrong_tensors_are_refused_before_anything_is_sent() {
    ranks::run("wrong_tensors_are_refused_before_anything_is_sent", 2, |rank| {
        let group = rank.group(PATIENCE);
        let tensor = |n: i64| Tensor::zeros([n], (Kind::Float, Cpu));
        let refused = |result: c10d::Result<c10d::Work>, part: &str| {
            let error = result.err().unwrap();
            assert!(matches!(&error, Error::Torch(m) if m.contains(part)), "{error:?} has no {part:?}");
        };
        refused(group.all_gather(&tensor(5), &tensor(3)), "has 5 elements and must have 6");
        refused(group.reduce_scatter(&tensor(3), &tensor(5), ReduceOp::Sum), "has 5 elements and must have 6");
        refused(group.all_to_all(&tensor(5), &tensor(5)), "has 5 elements and must have 4");
        refused(group.all_reduce(&Tensor::zeros([4, 4], (Kind::Float, Cpu)).tr(), ReduceOp::Sum), "not contiguous");
        refused(group.all_gather(&tensor(6), &tensor(3).to_kind(Kind::Double)), "");
        // The group is as good as before.
        group.all_reduce(&tensor(4), ReduceOp::Sum).unwrap().wait().unwrap();
    });
}

#[test]
fn ranks_that_agree_go_on() {
    ranks::run("ranks_that_agree_go_on", 2, |rank| {
        let group = rank.group(PATIENCE);
        group.agree("configuration", &[7; 32]).unwrap();
        group.barrier().unwrap();
    });
}

#[test]
fn ranks_that_differ_are_named_on_every_rank() {
    ranks::run("ranks_that_differ_are_named_on_every_rank", 4, |rank| {
        let group = rank.group(PATIENCE);
        let error = |odd: &[u32]| {
            let mut digest = [7; 32];
            // The last byte too must count.
            digest[31] = if odd.contains(&rank.rank) { 8 } else { 7 };
            match group.agree("configuration", &digest) {
                Err(Error::Disagreement(message)) => message,
                other => panic!("{other:?}"),
            }
        };
        assert!(error(&[2]).contains("do not have the same configuration: rank 2 differs from rank 0"));
        assert!(error(&[0]).contains("rank 0 differs from rank 1"));
        assert!(error(&[1, 3]).contains("ranks 1, 3 differ from rank 0"));
        group.agree("configuration", &[7; 32]).unwrap();
    });
}
