//! Looking at jobs and changing them; nothing here has to be a member of one.

use thalweg_protocol::{
    ApiReply, ApiRequest, JobCommand, JobKey, JobRecord, JobSummary, Progress, Roster, SettingsChange,
    SettingsRevision, limits,
};

use crate::{Client, Error, client::unexpected};

impl Client {
    /// Reads a job and its roster.
    ///
    /// # Errors
    /// `unknown_job`.
    pub async fn job(&self, key: &JobKey) -> Result<(JobRecord, Roster), Error> {
        match self.ask(&ApiRequest::GetJob(key.clone()), &mut self.patience()).await? {
            ApiReply::Job(record, roster) => Ok((*record, roster)),
            other => Err(unexpected(&other)),
        }
    }

    /// All jobs in the order of their keys; of one tenant, if named.
    ///
    /// # Errors
    /// When no gateway answers.
    pub async fn jobs(&self, tenant: Option<&thalweg_protocol::Name>) -> Result<Vec<JobSummary>, Error> {
        let mut all = Vec::new();
        let mut after = None;
        loop {
            let query = ApiRequest::Jobs { tenant: tenant.cloned(), after, limit: limits::MAX_PAGE / 4 };
            match self.ask(&query, &mut self.patience()).await? {
                ApiReply::JobPage { jobs, next } => {
                    all.extend(jobs);
                    after = next;
                }
                other => return Err(unexpected(&other)),
            }
            if after.is_none() {
                return Ok(all);
            }
        }
    }

    /// Where a job's shards stand.
    ///
    /// # Errors
    /// `unknown_job`, or what the store says of a job that has lost rounds.
    pub async fn progress(&self, key: &JobKey) -> Result<Progress, Error> {
        match self.ask(&ApiRequest::Progress(key.clone()), &mut self.patience()).await? {
            ApiReply::Progress(progress) => Ok(progress),
            other => Err(unexpected(&other)),
        }
    }

    /// Pauses, resumes or aborts a job. A pause is in force once all invokers have heard of it: at once, as a rule,
    /// after two seconds at the latest. Repeating a command changes nothing.
    ///
    /// # Errors
    /// `unknown_job`; that of a job that is over.
    pub async fn control(&self, key: &JobKey, command: JobCommand) -> Result<(), Error> {
        let query = ApiRequest::Control(key.clone(), command);
        match self.ask(&query, &mut self.patience()).await? {
            ApiReply::Done => Ok(()),
            other => Err(unexpected(&other)),
        }
    }

    /// Changes settings of a job's function from some round on: a learning rate, say. The answer names the round,
    /// which is later than asked for if that one was closed meanwhile; every shard uses the new settings from there
    /// on, and none before.
    ///
    /// # Errors
    /// `invalid_spec` for settings that the function refuses, or a round that may have begun.
    pub async fn set_settings(
        &self,
        key: &JobKey,
        change: SettingsChange,
    ) -> Result<SettingsRevision, Error> {
        let query = ApiRequest::SetSettings { key: key.clone(), change };
        match self.ask(&query, &mut self.patience()).await? {
            ApiReply::Settings(revision) => Ok(revision),
            other => Err(unexpected(&other)),
        }
    }

    /// Removes a job with everything of it. Its workers get `gone`.
    ///
    /// # Errors
    /// `unknown_job`.
    pub async fn delete(&self, key: &JobKey) -> Result<(), Error> {
        match self.ask(&ApiRequest::DeleteJob(key.clone()), &mut self.patience()).await? {
            ApiReply::Done => Ok(()),
            other => Err(unexpected(&other)),
        }
    }
}
