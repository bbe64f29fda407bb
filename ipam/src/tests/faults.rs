//! Storage that fails, is silent, or does what it does not answer.

use std::time::Duration;

use super::*;

#[tokio::test(start_paused = true)]
async fn a_lost_answer_is_found_again_by_its_handle() {
    let contents = Memory::default();
    let node = mk_node("n1", &contents, vec![pool("10.0.0.0/26", 26)]);
    node.allocator
        .assign(wanted("first"))
        .await
        .expect("an address");
    node.store.with(|contents| contents.lose_answers = 2);
    node.allocator
        .assign(wanted("second"))
        .await
        .expect("the write did get through");
    let allocated = node.store.with(|contents| {
        contents
            .blocks()
            .into_values()
            .map(|block| block.allocated().count())
            .sum::<usize>()
    });
    assert_eq!(allocated, 2);
}

#[tokio::test(start_paused = true)]
async fn storage_that_never_answers_ends_in_an_error_and_then_everything_goes_on() {
    let contents = Memory::default();
    let node = mk_node("n1", &contents, vec![pool("10.0.0.0/26", 26)]);
    node.allocator
        .assign(wanted("first"))
        .await
        .expect("an address");
    node.store.with(|contents| contents.is_silent = true);
    let (second, first) = tokio::join!(
        node.allocator.assign(wanted("second")),
        node.allocator.release("first".to_owned())
    );
    for error in [
        second.expect_err("no answer"),
        first.expect_err("no answer"),
    ] {
        assert!(
            matches!(&error, NoAddress::Unavailable(text) if text.contains("no answer")),
            "{error:?}"
        );
    }
    node.store.with(|contents| contents.is_silent = false);
    node.allocator
        .assign(wanted("third"))
        .await
        .expect("an address");
    node.allocator
        .release("first".to_owned())
        .await
        .expect("release");
    assert_eq!(
        node.store.with(|contents| held(contents, "first")),
        (vec![], vec![])
    );
}

#[tokio::test]
async fn what_is_not_found_is_released_once_it_is_known_what_the_node_has() {
    let contents = Memory::default();
    let node = mk_node("n1", &contents, vec![pool("10.0.0.0/26", 26)]);
    node.allocator
        .assign(wanted("h"))
        .await
        .expect("an address");
    node.store.with(|contents| contents.clear_handles());
    let restarted = mk_node("n1", &contents, vec![pool("10.0.0.0/26", 26)]);
    restarted.map.send_replace(None);
    let listing = async {
        tokio::task::yield_now().await;
        notify_blocks(&restarted, "n1");
    };
    tokio::join!(restarted.allocator.release("h".to_owned()), listing)
        .0
        .expect("release");
    assert_eq!(
        restarted.store.with(|contents| held(contents, "h").1),
        Vec::<String>::new()
    );
}

#[tokio::test(start_paused = true)]
async fn what_is_not_found_is_not_released_while_a_block_cannot_be_read() {
    let contents = Memory::default();
    let node = mk_node("n1", &contents, vec![pool("10.0.0.0/26", 26)]);
    node.allocator
        .assign(wanted("h"))
        .await
        .expect("an address");
    node.store.with(|contents| {
        contents.clear_handles();
        contents.is_silent = true;
    });
    let restarted = mk_node("n1", &contents, vec![pool("10.0.0.0/26", 26)]);
    notify_blocks(&restarted, "n1");
    let error = restarted
        .allocator
        .release("h".to_owned())
        .await
        .expect_err("the block is not read");
    assert!(
        matches!(&error, NoAddress::Unavailable(text) if text.contains("not been read")),
        "{error:?}"
    );
    node.store.with(|contents| contents.is_silent = false);
    while restarted.allocator.release("h".to_owned()).await.is_err() {}
    assert_eq!(
        restarted.store.with(|contents| held(contents, "h").1),
        Vec::<String>::new()
    );
}

#[tokio::test(start_paused = true)]
async fn a_write_that_failed_and_was_done_all_the_same_is_looked_at_before_a_release() {
    let contents = Memory::default();
    let node = mk_node("n1", &contents, vec![pool("10.0.0.0/26", 26)]);
    node.allocator
        .assign(wanted("first"))
        .await
        .expect("an address");
    node.store
        .with(|contents| (contents.lose_answers, contents.refuses_handles) = (1, true));
    node.allocator
        .assign(wanted("h"))
        .await
        .expect_err("a failure that is none");
    assert_eq!(
        node.store.with(|contents| held(contents, "h").1.len()),
        1,
        "the write did get through"
    );
    node.allocator
        .release("h".to_owned())
        .await
        .expect("what the service does after a failure");
    assert_eq!(
        node.store.with(|contents| held(contents, "h").1),
        Vec::<String>::new()
    );
}

#[tokio::test(start_paused = true)]
async fn a_release_is_answered_before_its_handle_is_deleted_and_the_next_one_waits_for_that() {
    let contents = Memory::default();
    let node = mk_node("n1", &contents, vec![pool("10.0.0.0/26", 26)]);
    let first = node.allocator.assign(wanted("h")).await;
    first.expect("an address");
    let (named, _) = node.store.with(|contents| held(contents, "h"));
    assert_eq!(named, ["10.0.0.0/26"]);
    node.store.with(|contents| contents.refuses_handles = true);
    node.allocator
        .release("h".to_owned())
        .await
        .expect("no block has it any more");
    assert_eq!(
        node.store.with(|contents| held(contents, "h")),
        (named.clone(), vec![]),
        "the deletion failed"
    );
    // An address that it had now would lose its handle to the next attempt.
    let mut again = std::pin::pin!(node.allocator.assign(wanted("h")));
    let early = tokio::time::timeout(Duration::from_millis(500), &mut again).await;
    early.expect_err("the handle is still being deleted");
    node.store.with(|contents| contents.refuses_handles = false);
    again.await.expect("an address");
    let (now_named, addresses) = node.store.with(|contents| held(contents, "h"));
    assert_eq!((now_named, addresses.len()), (named, 1));
}
