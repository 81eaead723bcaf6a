//! Handing partitions from one invoker to the next in order (rule P19).

use std::{
    sync::{Mutex, PoisonError},
    time::Duration,
};

use async_nats::{Client, Message, StatusCode, Subject, Subscriber};
use async_trait::async_trait;
use futures::{FutureExt as _, StreamExt as _};
use thalweg_broker::{delivered, remove_consumer};
use thalweg_protocol::{Epoch, HandedOver, Handover, Kind, Partition, frame, subjects};
use tokio::time::timeout;

use super::{Done, Shell};
use crate::{
    metrics,
    partition::{Peers, Silence, Takeover, TakeoverError},
};

/// Longest wait for a word of a former holder. One that needs longer may be frozen, and loses the partition as if it were
/// dead.
const PATIENCE: Duration = Duration::from_secs(1);
/// Pause before it is asked again when it does not hold the partition any more, and the next one may not listen yet.
const PAUSE: Duration = Duration::from_millis(10);
/// When the broker is asked how much it has delivered to a consumer that was handed over.
const LOOK_AFTER: Duration = Duration::from_millis(500);

/// Other invokers, through NATS.
pub(super) struct Neighbours {
    control: Client,
    /// For contributions: what is delivered is heard there.
    data: Client,
    listening: Mutex<Option<Subscriber>>,
    /// Where answers come, one for each question. The first question goes by the connection that it is subscribed by, so
    /// the broker knows of it before any answer; the others may overtake a subscription.
    answers: tokio::sync::Mutex<Option<(Subject, Subscriber)>>,
}

#[async_trait]
impl Peers for Neighbours {
    async fn ask(&self, handover: &Handover) -> Result<HandedOver, Silence> {
        let answer = self.answer(&self.control, subjects::handover(&handover.consumer), handover).await;
        if answer == Ok(HandedOver::NotHeld) {
            tokio::time::sleep(PAUSE).await;
        }
        answer
    }

    async fn listen(&self, handover: &Handover) -> Result<HandedOver, Silence> {
        let subject = subjects::deliveries(&handover.consumer);
        let deliveries = self.data.subscribe(subject.clone()).await.map_err(|_| Silence::Late)?;
        *self.listening.lock().unwrap_or_else(PoisonError::into_inner) = Some(deliveries);
        // By the same connection: the broker knows of the subscription first.
        self.answer(&self.data, subject, handover).await
    }

    async fn stop_listening(&self, _: &Handover) {
        self.listening();
    }
}

impl Neighbours {
    pub(super) fn new(control: Client, data: Client) -> Self {
        Self { control, data, listening: Mutex::default(), answers: tokio::sync::Mutex::default() }
    }

    /// The deliveries that are listened to.
    pub(super) fn listening(&self) -> Option<Subscriber> {
        self.listening.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// What the holder answers, on the connection for takeovers, to what is said by that connection.
    async fn answer(&self, by: &Client, to: String, handover: &Handover) -> Result<HandedOver, Silence> {
        let mut opened = self.answers.lock().await;
        if opened.is_none() {
            let inbox = Subject::from(self.control.new_inbox());
            let answers = self.control.subscribe(inbox.clone()).await.map_err(|_| Silence::Late)?;
            *opened = Some((inbox, answers));
        }
        let (inbox, answers) = opened.as_mut().ok_or(Silence::Late)?;
        let frame = frame::seal(Kind::Handover, handover, &[]);
        by.publish_with_reply(to, inbox.clone(), frame).await.map_err(|_| Silence::Late)?;
        let answer = timeout(PATIENCE, answers.next()).await.ok().flatten().ok_or(Silence::Late)?;
        if answer.status == Some(StatusCode::NO_RESPONDERS) {
            return Err(Silence::Nobody);
        }
        match frame::open::<HandedOver>(Kind::HandedOver, &answer.payload) {
            Ok((answer, _)) => Ok(answer),
            Err(error) => {
                tracing::warn!(%error, "a former holder's answer is not understood");
                Err(Silence::Late)
            }
        }
    }
}

/// Who waits for our partitions.
#[derive(Debug)]
pub(super) struct Handovers {
    life: u32,
    waiting: Vec<(Handover, Subject)>,
}

impl Handovers {
    pub(super) fn new() -> Self {
        Self { life: rand::random(), waiting: Vec::new() }
    }

    /// Under which we hear ourselves.
    pub(super) fn life(&self) -> u32 {
        self.life
    }
}

impl Shell {
    /// Sends ourselves a message behind the acknowledgements on the connection for contributions; it is received on the other
    /// one. A flush would be answered behind all contributions that are on their way.
    pub(super) async fn echo(&self, partition: Partition, consumer: String, delivery: u64) {
        let echo = Handover { partition, consumer, epoch: delivery };
        let frame = frame::seal(Kind::Handover, &echo, &[]);
        // One that is lost with the connection is not waited for.
        let _ = self.connection.client.publish(subjects::echo(self.handovers.life), frame).await;
    }

    /// What we have said to ourselves.
    pub(super) fn echoed(&mut self, message: &Message) {
        if let Ok((echo, _)) = frame::open::<Handover>(Kind::Handover, &message.payload) {
            self.holdings.echoed(echo.partition, &echo.consumer, echo.epoch);
        }
    }

    /// Removes a consumer of ours, whose partition has not been served for so long, and tells whoever waits for it.
    pub(super) async fn release(&mut self, partition: Partition, consumer: String, unserved: Duration) {
        remove_consumer(&self.control.connection.client, partition, &consumer).await;
        let unserved = u64::try_from(unserved.as_micros()).unwrap_or(u64::MAX);
        self.tell(partition, HandedOver::Left(unserved)).await;
    }

    /// Tells whoever waits for a partition of ours.
    pub(super) async fn tell(&mut self, partition: Partition, answer: HandedOver) {
        let of_it = |(handover, _): &mut (Handover, Subject)| handover.partition == partition;
        let mut waiting: Vec<_> = self.handovers.waiting.extract_if(.., of_it).collect();
        // The one by the newest placement; it is what all others will hear of.
        waiting.sort_by_key(|(handover, _)| handover.epoch);
        let newest = waiting.pop();
        for (_, reply) in waiting {
            self.hand_over(reply, HandedOver::NotYet).await;
        }
        if let Some((_, reply)) = newest {
            self.hand_over(reply, answer).await;
        }
    }

    /// Somebody takes one of our partitions over.
    pub(super) async fn asked_for(&mut self, message: Message) {
        let Some(reply) = message.reply else { return };
        match frame::open::<Handover>(Kind::Handover, &message.payload) {
            Ok((handover, _)) => match self.holdings.asked(&handover, self.elapsed()) {
                Some(answer) => self.hand_over(reply, answer).await,
                None => self.handovers.waiting.push((handover, reply)),
            },
            // It waits as long as for anybody who does not answer.
            Err(error) => tracing::warn!(%error, "a request for a handover is not understood"),
        }
    }

    /// Whoever takes a partition over hears what is delivered from here on; or it is what we have said when we took it over.
    pub(super) async fn heard(&mut self, message: Message) {
        let Some(reply) = message.reply else { return };
        let Ok((handover, _)) = frame::open::<Handover>(Kind::Handover, &message.payload) else { return };
        if self.holdings.get(handover.partition).is_some_and(|held| held.epoch == handover.epoch) {
            return;
        }
        let (answer, steps) = self.holdings.heard(&handover, self.core.rest(handover.partition));
        // Nobody serves the partition until this is heard.
        self.hand_over(reply, answer).await;
        self.step(steps).await;
    }

    /// Answers those who wait for what is not ours any more, and listens no more to what is not.
    pub(super) async fn answer_handovers(&mut self) {
        let holdings = &self.holdings;
        let holds = |handover: &Handover| holdings.holds(handover.partition, &handover.consumer);
        let idle = |(handover, _): &mut (Handover, Subject)| !holds(handover);
        let mut idle: Vec<_> = self.handovers.waiting.extract_if(.., idle).map(|(_, reply)| reply).collect();
        // What is held is listened to.
        let mut left = Vec::new();
        if self.deliveries.len() > holdings.count_held() {
            let keys = self.deliveries.keys();
            left.extend(keys.filter(|(partition, consumer)| !holdings.holds(*partition, consumer)).cloned());
        }
        for key in left {
            self.deliveries.remove(&key);
            self.not_yet.remove(&key);
            let Some(mut questions) = self.questions.remove(&key) else { continue };
            while let Some(Some(question)) = questions.next().now_or_never() {
                idle.extend(question.reply);
            }
        }
        for reply in idle {
            self.hand_over(reply, HandedOver::NotHeld).await;
        }
    }

    async fn hand_over(&self, reply: Subject, answer: HandedOver) {
        let frame = frame::seal(Kind::HandedOver, &answer, &[]);
        // Whoever does not hear it waits no longer than for a dead one.
        let _ = self.control.connection.client.publish(reply, frame).await;
    }

    /// Listens to what is delivered to a consumer of ours, and to whoever takes its partition over. `listening`: what is
    /// delivered is listened to already.
    pub(super) async fn listen(
        &mut self,
        partition: Partition,
        consumer: &str,
        listening: Option<Subscriber>,
    ) -> Result<(), async_nats::SubscribeError> {
        let key = (partition, consumer.to_owned());
        let control = &self.control.connection.client;
        let questions = control.subscribe(subjects::handover(consumer)).await?;
        let deliveries = match listening {
            Some(listening) => listening,
            None => self.connection.client.subscribe(subjects::deliveries(consumer)).await?,
        };
        self.questions.insert(key.clone(), questions);
        self.deliveries.insert(key, deliveries);
        Ok(())
    }

    /// Asks the broker in a while how much it has delivered to a consumer that was handed over: a delivery to both holders
    /// may have been to the former one only, if the broker was just about to make it when the next one began to listen.
    pub(super) fn look_after(&self, partition: Partition, consumer: String) {
        let queues = self.control.connection.jetstream.clone();
        self.work.push(Box::pin(async move {
            tokio::time::sleep(LOOK_AFTER).await;
            match delivered(&queues, partition, &consumer).await {
                Ok(deliveries) => Done::Delivered(partition, consumer, deliveries),
                Err(error) => {
                    tracing::debug!(partition, %error, "what was delivered is not known");
                    Done::Nothing
                }
            }
        }));
    }
}

/// Tells how long a partition that was taken over in order had no holder.
pub(super) fn note(partition: Partition, epoch: Epoch, result: &Result<Takeover, TakeoverError>) {
    if let Ok(Takeover::Held { partition: held, .. }) = result
        && let Some((unserved, _)) = held.handed_over
    {
        metrics::handed_over(unserved);
        tracing::info!(partition, epoch, unserved_ms = unserved.as_secs_f64() * 1e3, "handed over");
    }
}
