use super::*;

#[test]
fn a_stack_that_is_given_back_comes_again_and_costs_little() {
    let first = lease(4096).unwrap();
    let (base, slot) = (first.base(), first.slot());
    assert_eq!(first.size(), 4096);
    drop(first);
    let second = lease(100).unwrap();
    assert_eq!((second.base(), second.slot()), (base, slot));
    drop(second);
    let begin = std::time::Instant::now();
    for _ in 0..10_000_000 {
        drop(std::hint::black_box(lease(std::hint::black_box(4096)).unwrap()));
    }
    eprintln!("{:?} per 10 million", begin.elapsed());
}
